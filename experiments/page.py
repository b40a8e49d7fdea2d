"""A page in the browser: a picture and a phrase in, the mask, the pseudo-mask and their files out. Needs gradio.

    python -m experiments.page --ckpt best.pt       then open http://127.0.0.1:7860 in a browser of this machine
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from runtime.arguments import answer_early, at_least


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.page", description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default="best.pt", help="a checkpoint of train.py (default: best.pt)")
    parser.add_argument("--device", help="as predict.py's")
    parser.add_argument("--port", type=at_least(int, 1), default=7860, help="of the page's address (default: 7860)")
    return parser


if __name__ == "__main__":
    answer_early(command_line())

import predict
from imagery.pictures import lit
from imagery.results import Job, readable
from imagery.scenes import open_scene
from runtime.devices import choose_threads
from runtime.errors import UserError, exit_on_user_error


def answer(predictor: predict.RS2SAM2Predictor, folder: str, path: str | None, phrase: str):
    """(the overlay's file, the picture lit by the pseudo-mask, uint8 RGB, a line in words, files to download); UserError."""
    if not path:
        raise UserError("There is no picture yet: give one")
    out = tempfile.mkdtemp(dir=folder)
    options = predict.command_line().parse_args(["--image", path, "--out", out])
    if failures := predict.PredictionRun(predictor, options, [Job(Path(path), phrase, 1)]).run():
        raise UserError(failures[0][1])
    line = json.loads(Path(out, "results.jsonl").read_text(encoding="utf-8")) | {"image": Path(path).name}
    seen = open_scene(path).overview
    pseudo_mask = predictor.output([seen], [phrase]).pseudo_mask[0, 0].float().sigmoid().cpu().numpy()  # (g, g)
    overlay, *files = (f"{out}/{line[kind]}" for kind in ("overlay", "mask", "polygons") if kind in line)
    return overlay, lit(seen, pseudo_mask), readable(line, Path(line["mask"])), files


def main(arguments: list[str] | None = None) -> None:
    choose_threads()
    args = command_line().parse_args(arguments)
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs gradio: pip install gradio") from None
    predictor = predict.RS2SAM2Predictor.from_pretrained(args.ckpt, args.device)

    def told(function, *inputs):
        try:
            return function(*inputs)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with tempfile.TemporaryDirectory() as folder, gradio.Blocks(title="RS2-SAM 2", analytics_enabled=False) as page:
        with gradio.Row():
            file, phrase = gradio.File(label="picture, of any kind that predict.py takes"), gradio.Textbox(label="phrase")
        button, words = gradio.Button("find"), gradio.Textbox(label="result")
        with gradio.Row():
            picture, *found = (gradio.Image(label=name, height=340) for name in ("picture", "mask", "pseudo-mask"))
        found += [words, gradio.File(label="download", file_count="multiple")]
        file.upload(lambda path: told(open_scene, path).overview, file, picture)
        events, find = [button.click, phrase.submit], partial(told, answer, predictor, folder)
        gradio.on(events, find, [file, phrase], found, api_name="find")
        page.launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    with exit_on_user_error("page"):
        main()
