"""Where the weights of a checkpoint come from, and what they were taught: plain values that results can hold, and words."""

import os
import re
from pathlib import Path


def provenance(checkpoint: dict) -> dict:
    """{"model", "run", "data", "epoch", "score", "revision", "init"} of a checkpoint's dict, in plain values.

    run: the folder it was trained in. score: {"mIoU", "oIoU"} on the validation set, in per cent. init: the same of what it was
    fine-tuned from, and so on down the chain. None where that is unknown, as it is of published weights. hub, where it came
    from one: OWNER/NAME@COMMIT.
    """
    metrics, args = checkpoint.get("metrics") or {}, checkpoint.get("args") or {}
    init = checkpoint.get("init") or ({"file": args["init"]} if args.get("init") else None)
    score = {name: metrics[name] for name in ("mIoU", "oIoU") if name in metrics}
    run = checkpoint.get("run") or args.get("out")  # the second in older ones
    facts = {"model": checkpoint.get("model_name"), "run": run, "data": checkpoint.get("data")}
    facts |= {"epoch": checkpoint.get("epoch"), "score": score or None}
    facts |= {"hub": checkpoint["hub"]} if "hub" in checkpoint else {}
    return facts | {"revision": checkpoint.get("revision") or None, "init": init}


def in_words(origin: dict) -> str:
    """What `provenance` found, in a line."""
    score = ", ".join(f"{name} {value:.2f}" for name, value in (origin.get("score") or {}).items())
    parts = [
        origin.get("model"), (hub := origin.get("hub")) and f"from {hub}",
        (run := origin.get("run")) and f"run {run}", (data := origin.get("data")) and f"trained on {data}",
        (epoch := origin.get("epoch")) is not None and f"epoch {epoch}", score and f"validation {score}",
        (init := origin.get("init")) and f"fine-tuned from {init.get('file', '')} ({in_words(init)})".replace(" ()", ""),
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def weights_line(path: str | Path, checkpoint: dict) -> str:
    """The line that a program prints of the weights it was given: what the path resolves to, and their provenance."""
    found = linked(path)
    return f"{path}{f' -> {found}' if str(found) != str(path) else ''}: {in_words(provenance(checkpoint))}"


def started_from(path: str | Path, checkpoint: dict) -> dict:
    """The entry "init" of what is fine-tuned from a checkpoint: its "file" and `provenance`."""
    return {"file": str(linked(path))} | provenance(checkpoint)


def linked(path: str | Path) -> Path:
    """What a path is a link to, else the path."""
    path = Path(path)
    return Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path


def taught(dataset, checkpoint: dict | None = None) -> dict:
    """{"data", "generated", "words"} of a training set: its name, whether its scenes are generated, and every word of its
    phrases, sorted. What is fine-tuned from a checkpoint has been taught that one's words as well."""
    # Only generated scenes say the kinds of their phrases in REFER's layout.
    generated = bool(dataset.samples[0].kinds[0]) and not (dataset.root / "phrases.csv").exists()
    vocabulary = {word for sample in dataset.samples for phrase in sample.phrases for word in words(phrase)}
    if checkpoint:
        before = checkpoint.get("taught") or {}  # published weights don't say
        generated, vocabulary = generated and before.get("generated", False), vocabulary.union(before.get("words", ()))
    return {"data": dataset.name, "generated": generated, "words": sorted(vocabulary)}


def origin_note(facts: dict) -> str:
    """A sentence where a checkpoint has seen no real image, else ''."""
    generated = (facts.get("taught") or {}).get("generated")
    return "These weights were trained on generated scenes alone: they know no real image." if generated else ""


def unknown_words_note(facts: dict, phrase: str) -> str:
    """A sentence where a phrase has words that training never said and whose vectors mean nothing therefore, else ''.

    facts: the entries of a checkpoint. An encoder that was pretrained knows more words than its training set's."""
    lesson, encoder = facts.get("taught"), (facts.get("preset") or {}).get("encoder_name")
    if not lesson or not isinstance(encoder, dict):
        return ""
    unknown = [word for word in dict.fromkeys(words(phrase)) if word not in set(lesson["words"])]
    return f"Training never said {', '.join(map(repr, unknown))}: the model can't know what is meant." if unknown else ""


def words(phrase: str) -> list[str]:
    """The words of a phrase in lower case, in their order: letters and digits, with hyphens and apostrophes inside."""
    return re.findall(r"\w+(?:[-'’]\w+)*", phrase.lower())
