"""The tools beside the method."""

import sys
from pathlib import Path

from data import open_dataset
from scenes import make_scenes

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from language import Shuffled  # noqa: E402


def test_shuffled_phrases_come_from_other_images(tmp_path):
    make_scenes(tmp_path / "scenes", train=1, val=7, test=0, size=96, progress=False)
    dataset = open_dataset(str(tmp_path / "scenes"), "val", image_size=64, encoder_size=64)
    shuffled = Shuffled(dataset, seed=0)
    own = {}
    for i, j in dataset.items:
        own.setdefault(dataset.samples[i].image, []).append(dataset.samples[i].phrases[j])
    assert sorted(shuffled.phrases) == sorted(p for phrases in own.values() for p in phrases)
    donors = [image for image, phrases in own.items() for _ in phrases]
    for index, (i, _) in enumerate(dataset.items):
        givers = [image for image in own if shuffled.phrases[index] in own[image]]
        assert set(givers) != {dataset.samples[i].image} and len(donors) == len(dataset)
        assert shuffled[index]["phrase"] == shuffled.phrases[index]
        assert (shuffled[index]["mask"] == dataset[index]["mask"]).all()
