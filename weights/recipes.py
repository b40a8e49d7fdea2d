"""The preset and the recipe of a run: those of a name in presets.py or of a checkpoint, changed by --set."""

from model import count_parameters
from presets import PRESETS, RECIPES, Preset, Recipe, differences, find_preset, in_words, with_settings
from runtime.errors import UserError
from runtime.processes import world_size
from weights.checkpoints import stored_preset, stored_recipe
from weights.provenance import weights_line
from weights.saved import without_infinity

FREE = ("lr", "epochs", "samples", "batch_size")  # what --resume may change


def resolve(model: str, settings: list[str], checkpoint: dict | None = None, resume: bool = False) -> tuple[Preset, Recipe]:
    """The complete records of a new run, of one that fine-tunes a checkpoint, or of one that goes on with it; UserError for
    a name that has no preset, and for a setting that it can't change, which names the value in the checkpoint and the one
    asked for."""
    preset = stored_preset(checkpoint) if checkpoint else find_preset(model)
    recipe = stored_recipe(checkpoint) if resume else RECIPES.get(model, Recipe())
    new = with_settings(preset, recipe, settings)
    changes = differences((preset, recipe), new) if resume else differences((preset,), new[:1]) if checkpoint else {}
    if fixed := [name for name in changes if name not in (FREE if resume else ("image_size",))]:
        old, asked = changes[fixed[0]] if checkpoint else (None, None)
        what = f"--set {' '.join(settings)}: {fixed[0]} is {old!r} in the checkpoint, {asked!r} is asked for; "
        remedy = f"--resume can change {', '.join(FREE)}: start a new run, or go on from its weights by --init"
        raise UserError(what + (remedy if resume else "--init fixes the network, of which image_size alone can be changed"))
    return new


def news(checkpoint: dict, new: tuple[Preset, Recipe], model: str) -> list[str]:
    """What is to be said where a run goes on: what changes with that, and what presets.py has changed meanwhile."""
    old = stored_preset(checkpoint), stored_recipe(checkpoint)
    lines = [f"from here on {name} is {now!r}, it was {was!r}" for name, (was, now) in differences(old, new).items()]
    known = PRESETS.get(model, old[0]) if not checkpoint["args"].get("init") else old[0]
    today = with_settings(known, RECIPES.get(model, Recipe()), checkpoint["args"].get("set") or [])
    built = ("encoder_tag", "train_trunk", *["encoder_args"] * (old[0].encoder == "beit3"))  # by `build_model`, of the weights
    changed = {name: pair for name, pair in differences(today, old).items() if name.partition(".")[0] not in (*FREE, *built)}
    return lines + [f"the run goes on with its own {name}, {own!r}: in presets.py it is {there!r} now"
                    for name, (there, own) in changed.items()]  # fmt: skip


def opening(run, checkpoint: dict | None) -> str:
    """The lines that a run, of train.py, begins with: all its numbers, the weights that --init names, what is new with
    --resume."""
    args, model = run.args, run.model
    variant = args.model + (f" without {', '.join(run.left_out)}" if run.left_out else "")
    where = f"{world_size()} x {run.device.type}" if world_size() > 1 else run.device
    counts = f"{len(run.train_set):,} training targets, {len(run.val_set):,} validation phrases"
    lines = [f"{variant} on {args.data} ({counts}), {where}, run {args.out}"]
    lines.append("parameters: " + ", ".join(f"{n:,} {kind}" for kind, n in count_parameters(model).items()))
    lines += [in_words("preset", model.preset), in_words("recipe", run.recipe)]
    if args.resume:
        lines += news(checkpoint, (model.preset, run.recipe), args.model)
    elif args.init:
        lines.append(weights_line(args.init, checkpoint))
    return "\n".join(lines)


def first_line(checkpoint: dict) -> dict:
    """The first line of log.jsonl: what a run is, of the entries that it stores in checkpoints."""
    names = ("run", "model_name", "data", "preset", "recipe", "left_out", "init", "revision")
    return without_infinity({name: checkpoint[name] for name in names})
