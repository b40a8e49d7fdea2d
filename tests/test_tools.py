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
    assert sorted(shuffled.donors) == sorted(dataset.items)  # every phrase is used once
    for index, ((i, _), (donor, j)) in enumerate(zip(dataset.items, shuffled.donors)):
        assert dataset.samples[donor].image != dataset.samples[i].image
        assert shuffled[index]["phrase"] == dataset.samples[donor].phrases[j]
        assert (shuffled[index]["mask"] == dataset[index]["mask"]).all()
