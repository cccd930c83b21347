#!/usr/bin/env python3
"""Holds the files that carrousel exports against onnxruntime, against an LSTM written out in numpy, and against PyTorch where that is installed.

    check_onnx.py --carrousel target/debug/carrousel --work DIR [--samples DIR]

trains a small run for each configuration, exports it in both formats, and compares onnxruntime's outputs with those of `carrousel evaluate`:
all at once, in windows with the state carried from one to the next, and in batches of unequal lengths. Samples are files of networks that the
program cannot train yet, and LSTMs with PyTorch's results; `tests/interchange.rs` writes them where CARROUSEL_INTERCHANGE_SAMPLES says.
Exit code 0: everything agrees to 1e-5. `run.sh` beside this file does it all.
"""

import argparse
import csv
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime

try:
    import torch
except ImportError:
    torch = None

TOLERANCE = 1e-5

# What is typed after `train`. Texts and tables are written by `make_data`.
CONFIGS = {
    "char-1": "--data text.txt --level char --layers 1 --hidden 16",
    "char-2-no-bias": "--data text.txt --level char --layers 2 --hidden 24 --embedding 10 --no-bias",
    "char-3-tied": "--data text.txt --level char --layers 3 --hidden 20 --embedding 20 --tied --dropout 0.2",
    "byte-2-odd": "--data text.txt --level byte --layers 2 --hidden 17 --embedding 5",
    "word-1-tied-no-bias": "--data text.txt --level word --layers 1 --hidden 13 --embedding 13 --tied --no-bias",
    "word-2": "--data text.txt --level word --layers 2 --hidden 33 --embedding 7",
    "series-1": "--data one.csv --layers 1 --hidden 12 --seq-len 20 --horizon 3",
    "series-2-no-bias": "--data many.csv --target a --features b,c --layers 2 --hidden 15 --no-bias --seq-len 11 --horizon 4",
    "series-3-two-targets": "--data many.csv --target a,c --layers 3 --hidden 33 --seq-len 9 --horizon 2 --relative last",
    "series-both-ways": "--data many.csv --target a --layers 2 --hidden 9 --bidirectional --dropout 0.2 --seq-len 9 --horizon 2",
    "series-peepholes": "--data one.csv --layers 2 --hidden 11 --peephole --coupled-gates --recurrent-dropout 0.2 --weight-drop 0.1 --seq-len 12 --horizon 3",
    "series-unlike-widths": "--data one.csv --hidden 10,7,13 --seq-len 12 --horizon 3",
    "series-residual": "--data many.csv --target a --features b,c --layers 3 --hidden 8 --residual --dropout 0.1 --seq-len 9 --horizon 2",
    "series-residual-both-ways": "--data many.csv --target a --features b --layers 3 --hidden 7 --residual --bidirectional --seq-len 9 --horizon 2",
    "char-residual": "--data text.txt --level char --layers 2 --hidden 12 --embedding 12 --residual",
    "series-learned-state": "--data many.csv --target a --layers 2 --hidden 9 --bidirectional --learned-state --seq-len 9 --horizon 2",
    "char-learned-state": "--data text.txt --level char --layers 2 --hidden 12 --residual --embedding 12 --learned-state",
    "series-calendar": "--data many.csv --target b --season 12 --calendar --relative none --layers 1 --hidden 64 --seq-len 24 --horizon 12",
}


def make_data(folder):
    draw = random.Random(3)
    words = ["the wheel ", "turns ", "and turns ", "again; ", "a ring ", "of rings, ", "slowly\n"]
    (folder / "text.txt").write_text("".join(draw.choice(words) for _ in range(700)))
    with open(folder / "one.csv", "w") as file:
        file.write("x\n" + "".join(f"{math.sin(i / 5) * 30 + 400 + draw.random()}\n" for i in range(300)))
    with open(folder / "many.csv", "w") as file:
        file.write("a,b,c\n")
        for i in range(400):
            file.write(f"{math.sin(i / 7) + i / 50},{math.cos(i * math.tau / 12) * 100 + draw.random()},{draw.gauss(-3, 0.1)}\n")


def read_safetensors(path):
    """Tensors and metadata; the format is eight bytes of length, a JSON header, the data."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        kind = {"F32": "<f4", "I64": "<i8"}[info["dtype"]]
        tensors[name] = np.frombuffer(data[8 + n + start : 8 + n + end], kind).reshape(info["shape"])
    return tensors, metadata


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Reference:
    """The exported parameters in float64, by PyTorch's equations; peepholes and coupled gates by ONNX's."""

    def __init__(self, path, coupled=False, residual=False, mean=False):
        tensors, _ = read_safetensors(path)
        self.p = {name: values.astype(np.float64) for name, values in tensors.items()}
        self.coupled, self.residual, self.mean = coupled, residual, mean
        self.layers = 0
        while f"lstm.weight_ih_l{self.layers}" in self.p:
            self.layers += 1
        self.directions = 2 if "lstm.weight_ih_l0_reverse" in self.p else 1

    def hidden(self, layer):
        return self.p[f"lstm.weight_hh_l{layer}"].shape[1]

    def start(self, layer, n_rows):
        """The state to begin from where none is given: h and c [D, B, H]."""
        rows = []
        for which in "hc":
            zero = np.zeros(self.hidden(layer))
            lanes = [self.p.get(f"lstm.initial_{which}_l{layer}{suffix}", zero) for suffix in ("", "_reverse")[: self.n_directions(layer)]]
            rows.append(np.repeat(np.stack(lanes)[:, None], n_rows, axis=1))
        return tuple(rows)

    def n_directions(self, layer):
        return 2 if f"lstm.weight_ih_l{layer}_reverse" in self.p else 1

    def sequence(self, x, layer, suffix, h, c):
        """One row, [T, I]; returns [T, H], h, c."""
        get = lambda what: self.p.get(f"lstm.{what}_l{layer}{suffix}")
        bias = 0 if get("bias_ih") is None else get("bias_ih") + get("bias_hh")
        peephole = get("weight_peephole")
        pi, pf, po = (0, 0, 0) if peephole is None else peephole.reshape(3, -1)
        out = []
        for row in x[::-1] if suffix else x:
            i, f, g, o = np.split(get("weight_ih") @ row + get("weight_hh") @ h + bias, 4)
            i, g = sigmoid(i + pi * c), np.tanh(g)
            f = 1 - i if self.coupled else sigmoid(f + pf * c)
            c = f * c + i * g
            h = sigmoid(o + po * c) * np.tanh(c)
            out.append(h)
        out = np.array(out).reshape(len(x), len(h))
        return (out[::-1] if suffix else out), h, c

    def run(self, inputs, lengths, states, per_step):
        """inputs [T, B] or [T, B, I]; states[layer] = (h [D, B, H], c). Returns the outputs and the final states."""
        n_steps, n_rows = inputs.shape[:2]
        finals = [(np.zeros_like(h), np.zeros_like(c)) for h, c in states]
        tops = []
        for b in range(n_rows):
            x = inputs[: lengths[b], b]
            x = self.p["embedding.weight"][x] if "embedding.weight" in self.p else x.astype(np.float64)
            for layer in range(self.layers):
                parts = []
                for d in range(self.n_directions(layer)):
                    out, h, c = self.sequence(x, layer, "_reverse" if d else "", states[layer][0][d, b], states[layer][1][d, b])
                    finals[layer][0][d, b], finals[layer][1][d, b] = h, c
                    parts.append(out)
                below, x = x, np.concatenate(parts, axis=1)
                if self.residual and layer > 0 and below.shape == x.shape:
                    x = x + below
            tops.append(x)
        if per_step:
            top = np.zeros((n_steps, n_rows, tops[0].shape[1]))
            for b, x in enumerate(tops):
                top[: len(x), b] = x
        elif self.mean:
            top = np.stack([x.mean(axis=0) for x in tops])
        else:
            # What the last layer hands up at each direction's last step.
            half = self.hidden(self.layers - 1)
            top = np.stack([np.concatenate([x[-1, :half], x[0, half:]]) for x in tops])
        return top @ self.p["head.weight"].T + self.p["head.bias"], finals


class Checker:
    def __init__(self):
        self.failed = 0

    def compare(self, what, found, expected):
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
        if found.shape != expected.shape:
            self.failed += 1
            print(f"  FAILED {what}: shape {found.shape}, expected {expected.shape}")
            return
        assert expected.size and np.abs(expected).max() > 1e-3, f"{what}: nothing to compare"
        worst = np.abs(found - expected).max()
        fine = worst <= TOLERANCE  # false for NaN
        self.failed += not fine
        print(f"  {'ok    ' if fine else 'FAILED'} {what}: largest difference {worst:.1e} of values up to {np.abs(expected).max():.2g}")


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that inputs with defaults are inputs
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check_against_numpy(checker, onnx, reference, vocabulary, n_features, per_step):
    """Random inputs, lengths and states."""
    draw = np.random.default_rng(5)
    n_steps, n_rows = 13, 6
    if vocabulary:
        inputs = draw.integers(0, vocabulary, (n_steps, n_rows))
    else:
        inputs = draw.normal(size=(n_steps, n_rows, n_features)).astype(np.float32)
    lengths = np.array([13, 1, 7, 13, 2, 5], np.int32)
    states, feeds = [], {}
    for layer in range(reference.layers):
        shape = (reference.n_directions(layer), n_rows, reference.hidden(layer))
        states.append(tuple((draw.normal(size=shape) / 2).astype(np.float32) for _ in "hc"))
    defaults = {value.name for value in onnx.get_overridable_initializers()}
    for which, name in enumerate("hc"):
        if f"{name}_0" in defaults:
            feeds[f"{name}_0"] = np.concatenate([state[which] for state in states])
        else:
            feeds.update({f"{name}_0_l{layer}": state[which] for layer, state in enumerate(states)})
    assert defaults == {"lengths", *feeds}, defaults
    names = [value.name for value in onnx.get_outputs()]
    start = [reference.start(layer, n_rows) for layer in range(reference.layers)]
    given = [(h.astype(np.float64), c.astype(np.float64)) for h, c in states]
    full = np.full(n_rows, n_steps)
    for what, feed, lens, start in [
        ("plain", {}, full, start),
        ("lengths and initial state", {"lengths": lengths, **feeds}, lengths, given),
    ]:
        found = dict(zip(names, onnx.run(None, {"input": inputs, **feed})))
        output, finals = reference.run(inputs, lens, start, per_step)
        # What stands behind a row's end means nothing.
        if per_step:
            mask = (np.arange(n_steps)[:, None] < lens[None, :])[:, :, None]
            found["output"], output = found["output"] * mask, output * mask
        checker.compare(f"output, numpy, {what}", found["output"], output)
        for which, name in enumerate("hc"):
            if f"{name}_n" in found:
                checker.compare(f"{name}_n, numpy, {what}", found[f"{name}_n"], np.concatenate([final[which] for final in finals]))
            else:
                for layer, final in enumerate(finals):
                    checker.compare(f"{name}_n_l{layer}, numpy, {what}", found[f"{name}_n_l{layer}"], final[which])


def check_text(checker, onnx, said, table):
    """Streams as carrousel evaluated them: whole, in windows with carried state, and all in one batch of unequal lengths."""
    streams = [np.flatnonzero(said["stream"] == stream) for stream in np.unique(said["stream"])]
    tokens = said["input"].astype(np.int64)
    rows = streams[0]
    whole = onnx.run(["output"], {"input": tokens[rows, None]})[0]
    checker.compare("output, carrousel, one stream", whole[:, 0], said["output"][rows])
    parts, state = [], {}
    for start in range(0, len(rows), 7):
        output, h, c = onnx.run(["output", "h_n", "c_n"], {"input": tokens[rows[start : start + 7], None], **state})
        parts.append(output[:, 0])
        state = {"h_0": h, "c_0": c}
    checker.compare("output, carrousel, carried state", np.concatenate(parts), said["output"][rows])
    lengths = np.array([len(rows) for rows in streams], np.int32)
    batch = np.zeros((lengths.max(), len(streams)), np.int64)
    for b, rows in enumerate(streams):
        batch[: len(rows), b] = tokens[rows]
    output = onnx.run(["output"], {"input": batch, "lengths": lengths})[0]
    joined = np.concatenate([output[: len(rows), b] for b, rows in enumerate(streams)])
    order = np.concatenate(streams)
    checker.compare("output, carrousel, lengths", joined, said["output"][order])
    logits = joined.astype(np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    log_p = log_p[np.arange(len(order)), said["target"][order].astype(np.int64)]
    checker.compare("log probabilities, evaluate --output .csv", log_p, [float(row["log_probability"]) for row in table])


def check_series(checker, onnx, said, table, scale):
    inputs = said["input"].transpose(1, 0, 2)
    output = onnx.run(["output"], {"input": inputs})[0]
    checker.compare("output, carrousel, windows", output, said["output"])
    # Rows that are longer than their window, ended by `lengths`.
    longer = np.concatenate([inputs, np.ones_like(inputs[:3])])
    lengths = np.full(inputs.shape[1], len(inputs), np.int32)
    output = onnx.run(["output"], {"input": longer, "lengths": lengths})[0]
    checker.compare("output, carrousel, lengths", output, said["output"])
    # The table is in the data's unit: metadata_props tell how to get there and back.
    columns = {column["name"]: column for column in scale["outputs"]}
    values, known = [], []
    for row, y in zip(table, output.reshape(-1)):
        column = columns[row["target"]]
        if not column["relative"]:
            values.append(y)
            known.append((float(row["value"]) - column["offset"]) / column["scale"])
    if values:
        checker.compare("values, evaluate --output .csv", values, known)


def check_torch(checker, folder, said, vocabulary):
    """A module of embedding, lstm and head loads the file strictly, as does nn.LSTM the bare names."""
    tensors = {name: torch.from_numpy(values.copy()) for name, values in read_safetensors(folder / "m.safetensors")[0].items()}
    bare = {name: torch.from_numpy(values.copy()) for name, values in read_safetensors(folder / "lstm.safetensors")[0].items()}
    hidden, layers = bare["weight_hh_l0"].shape[1], sum(name.startswith("weight_hh_l") for name in bare)
    lstm = lambda: torch.nn.LSTM(bare["weight_ih_l0"].shape[1], hidden, layers, bias="bias_ih_l0" in bare)
    alone = lstm()
    alone.load_state_dict(bare, strict=True)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if vocabulary:
                self.embedding = torch.nn.Embedding(vocabulary, bare["weight_ih_l0"].shape[1])
            self.lstm = lstm()
            self.head = torch.nn.Linear(hidden, len(tensors["head.bias"]))

    module = Module()
    module.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        if vocabulary:
            rows = said["stream"] == said["stream"][0]
            x = module.embedding(torch.from_numpy(said["input"][rows].astype(np.int64))[:, None])
            expected, found = said["output"][rows], module.head(module.lstm(x)[0])[:, 0]
        else:
            x = torch.from_numpy(said["input"].transpose(1, 0, 2).copy())
            expected, found = said["output"], module.head(module.lstm(x)[0][-1])
        checker.compare("output, carrousel, torch", found, expected)
        checker.compare("nn.LSTM alone, torch", alone(x)[0], module.lstm(x)[0])


def check_config(checker, carrousel, work, name, flags):
    folder = work / name
    run = folder / "run"
    folder.mkdir()

    def call(*args):
        done = subprocess.run([carrousel, *args], cwd=work, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {' '.join(map(str, args))}\n{done.stderr}")

    usual = "--max-steps 40 --eval-batch-size 4 --lr 0.02 --devices cpu:1 --quiet"
    call("train", "--out", run, *usual.split(), *flags.split())
    call("export", "--run", run, "--format", "onnx", "--output", folder / "m.onnx")
    call("export", "--run", run, "--format", "safetensors", "--output", folder / "m.safetensors")
    is_torchs = not any(option in flags for option in ("--peephole", "--residual", "--learned-state")) and "unlike" not in name
    if is_torchs:
        call("export", "--run", run, "--format", "safetensors", "--part", "lstm", "--output", folder / "lstm.safetensors")
    for form in ("csv", "safetensors"):
        call("evaluate", "--run", run, "--devices", "cpu:1", "--quiet", "--output", folder / f"said.{form}")
    # There and back again, nothing has changed.
    for form in ("onnx", "safetensors"):
        call("import", "--input", folder / f"m.{form}", "--out", folder / f"from-{form}", "--quiet")
        call("evaluate", "--run", folder / f"from-{form}", "--devices", "cpu:1", "--quiet", "--output", folder / f"again-{form}.csv")
        same = (folder / f"again-{form}.csv").read_bytes() == (folder / "said.csv").read_bytes()
        checker.failed += not same
        print(f"  {'ok    ' if same else 'FAILED'} imported from {form}: the same predictions")

    said, _ = read_safetensors(folder / "said.safetensors")
    with open(folder / "said.csv", newline="") as file:
        table = list(csv.DictReader(file))
    onnx = session(folder / "m.onnx")
    metadata = onnx.get_modelmeta()
    assert metadata.producer_name == "carrousel" and metadata.custom_metadata_map["format_version"] == "1"
    reference = Reference(folder / "m.safetensors", "--coupled-gates" in flags, "--residual" in flags)
    is_text = "embedding.weight" in reference.p
    vocabulary = len(reference.p["embedding.weight"]) if is_text else 0
    if is_text:
        check_text(checker, onnx, said, table)
    else:
        check_series(checker, onnx, said, table, json.loads(metadata.custom_metadata_map["scale"]))
    check_against_numpy(checker, onnx, reference, vocabulary, 0 if is_text else said["input"].shape[2], is_text)
    # The head of both directions reads their final states, which a module has to say in words of its own.
    if torch and is_torchs and "--bidirectional" not in flags:
        check_torch(checker, folder, said, vocabulary)


def check_sample(checker, path):
    _, metadata = read_safetensors(path.with_suffix(".safetensors"))
    model = json.loads(metadata["model"])
    reference = Reference(path.with_suffix(".safetensors"), model["coupled"], model["residual"], model["mean"])
    is_text = "embedding.weight" in reference.p
    vocabulary = len(reference.p["embedding.weight"]) if is_text else 0
    n_features = reference.p["lstm.weight_ih_l0"].shape[1]
    check_against_numpy(checker, session(path), reference, vocabulary, n_features, is_text)


def check_torchs_case(checker, path):
    """An LSTM alone, against what PyTorch computed (tests/vectors)."""
    case, _ = read_safetensors(path.with_suffix(".safetensors"))
    batch_first = json.loads(path.with_suffix(".json").read_text()).get("batch_first")
    turned = lambda name: case[name].swapaxes(0, 1) if batch_first else case[name]
    feeds = {"input": np.ascontiguousarray(turned("input"))}
    feeds.update({name: case[name] for name in ("h_0", "c_0") if name in case})
    if "lengths" in case:
        feeds["lengths"] = case["lengths"].astype(np.int32)
    for name, found in zip(("output", "h_n", "c_n"), session(path).run(["output", "h_n", "c_n"], feeds)):
        checker.compare(f"{name}, PyTorch's", found, turned(name) if name == "output" else case[name])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carrousel", type=Path, required=True, help="the program")
    parser.add_argument("--work", type=Path, required=True, help="a folder for runs and files; emptied first")
    parser.add_argument("--samples", type=Path, help="files that tests/interchange.rs wrote")
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    make_data(args.work)
    checker = Checker()
    print(f"onnxruntime {onnxruntime.__version__}, numpy {np.__version__}, torch {torch.__version__ if torch else 'not installed: left out'}")
    for name, flags in CONFIGS.items():
        print(f"{name}: {flags}")
        check_config(checker, args.carrousel.resolve(), args.work.resolve(), name, flags)
    samples = sorted(args.samples.glob("*.onnx")) if args.samples else []
    if args.samples and not samples:
        sys.exit(f"no .onnx file in {args.samples}")
    for path in samples:
        print(f"sample {path.stem}")
        check_sample(checker, path)
    cases = sorted((args.samples / "torch").glob("*.onnx")) if args.samples else []
    for path in cases:
        print(f"case {path.stem}")
        check_torchs_case(checker, path)
    print(f"{len(CONFIGS)} configurations, {len(samples)} samples, {len(cases)} cases of PyTorch's: {checker.failed} failures")
    sys.exit(1 if checker.failed else 0)


if __name__ == "__main__":
    main()
