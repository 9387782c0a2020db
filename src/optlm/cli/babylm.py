"""The BabyLM protocol: train on 10 or 100 million words, test minimal pairs and surprisal.

Needs PyTorch: pip install 'optlm[train]'.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from optlm.cli.common import FAILURE, add_device_option, add_json_option, exit_code_of, say
from optlm.cli.progress import count_bar
from optlm.errors import ConfigError

USAGE = "train CONFIG --out RUN | test [-m MODEL] [--pairs FILE] [--text FILE]"


def add_options(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    told = "train by the words read; the same command resumes"
    train = actions.add_parser("train", help=told, description=told, allow_abbrev=False)
    train.add_argument("config", metavar="CONFIG", type=Path, help="JSON file of the settings")
    train.add_argument("--out", type=Path, required=True, help="folder of the run")
    train.add_argument("--data", type=Path, help="folder of the packed tokens (OUT/data)")
    add_device_option(train)
    train.set_defaults(do=_train)
    told = "minimal pairs and surprisal of any checkpoint"
    test = actions.add_parser("test", help=told, description=told, allow_abbrev=False)
    test.add_argument("-m", "--model", help="folder or hub name (default: the bundled model)")
    test.add_argument("--pairs", type=Path, metavar="FILE", help="JSON Lines with good and bad")
    test.add_argument("--text", type=Path, metavar="FILE", help="texts to take the surprisal of")
    test.add_argument("--text-bytes", type=int, metavar="N", help="only the first N of them")
    add_device_option(test)
    add_json_option(test)
    test.set_defaults(do=_test)


def run(options: Namespace) -> int | None:
    try:
        code: int | None = options.do(options)
    except ModuleNotFoundError as error:
        say(f"error: this needs {error.name}; install it with: pip install 'optlm[train]'")
        return FAILURE
    return code


def _train(options: Namespace) -> int | None:
    from optlm.train.pretrain.babylm import BabySettings, train

    settings = BabySettings.from_file(options.config)
    try:
        train(settings, options.out, data_folder=options.data, device=options.device, log=say)
    except KeyboardInterrupt as interrupt:
        say(f"stopped; the same command resumes from {options.out}")
        return exit_code_of(interrupt)
    return None


def _test(options: Namespace) -> None:
    if options.pairs is None and options.text is None:
        raise ConfigError("give --pairs FILE, --text FILE, or both")
    from optlm.assets import bundled_model
    from optlm.checkpoint import open_checkpoint
    from optlm.model import OPT
    from optlm.tokenizer import Tokenizer
    from optlm.train.loop.device import training_device
    from optlm.train.pretrain.pairs import judge_pairs, read_pairs, read_texts, surprisal

    device = training_device(options.device)
    pairs = read_pairs(options.pairs) if options.pairs else []
    source = options.model or bundled_model()
    model = OPT.from_checkpoint(source).to(device)
    tokenizer = Tokenizer.from_folder(open_checkpoint(source).folder, model.config)

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer.encode_batch(texts, add_bos=True, parse_special=False)

    figures: dict[str, Any] = {}
    with device:
        if pairs:
            with count_bar("sentences", 2 * len(pairs)) as advance:
                figures["pairs"] = judge_pairs(model, encode, pairs, progress=advance)
        if options.text:
            texts = read_texts(options.text, options.text_bytes)
            figures["surprisal"] = surprisal(model, encode, texts)
    print(json.dumps(figures) if options.json else _table(figures))


def _table(figures: dict[str, Any]) -> str:
    lines = []
    if pairs := figures.get("pairs"):
        lines.append(f"{pairs['accuracy']:6.1%}  of {pairs['pairs']:,} minimal pairs")
        for kind in ("field", "phenomenon"):
            shares = sorted(pairs.get(kind, {}).items())
            lines += [f"{share:6.1%}  {kind} {name}" for name, share in shares]
    if surprise := figures.get("surprisal"):
        lines.append(
            f"{surprise['bits_per_word']:.2f} bits a word, {surprise['bits_per_byte']:.3f} a byte "
            f"({surprise['words']:,} words)"
        )
    return "\n".join(lines)
