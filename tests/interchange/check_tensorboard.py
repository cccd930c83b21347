"""Reads the event files of `train --tensorboard` with TensorBoard's own reader, and holds what it finds against metrics.jsonl and the checkpoint.

    check_tensorboard.py --carrousel PROGRAM --work FOLDER
"""

import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys

from tensorboard.backend.event_processing import event_file_loader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

KEEP_ALL = {"scalars": 0, "histograms": 0, "compressedHistograms": 0, "images": 0, "tensors": 0}
# The tags of a step's numbers, and the fields of its event.
STEP = {"loss/train": "loss", "learning_rate": "lr", "gradient_norm": "grad_norm", "tokens_per_second/all": "tokens_per_second"}


def call(program, *arguments):
    done = subprocess.run([program, *arguments, "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, arguments))} failed: {done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(what, found, wanted, tolerance=1e-6):
    assert len(found) == len(wanted), f"{what}: {len(found)} values instead of {len(wanted)}: {found} {wanted}"
    for (step, value), (wanted_step, wanted_value) in zip(found, wanted):
        assert step == wanted_step, f"{what}: step {step} instead of {wanted_step}"
        assert math.isclose(value, wanted_value, rel_tol=tolerance, abs_tol=1e-12), f"{what} at step {step}: {value}, not {wanted_value}"


def accumulated(run):
    files = EventAccumulator(str(run / "tensorboard"), size_guidance=KEEP_ALL)
    files.Reload()
    return files


def check_scalars(run, files):
    events = metrics(run)
    found = lambda tag: [(event.step, event.value) for event in files.Scalars(tag)]
    steps = [event for event in events if event["event"] == "step"]
    for tag, field in STEP.items():
        same(tag, found(tag), [(event["step"], event[field]) for event in steps])
    for rank in range(2):
        wanted = [(event["step"], event["device_tokens_per_second"][rank]) for event in steps]
        same(f"rank {rank}", found(f"tokens_per_second/worker {rank} cpu:1"), wanted)
    judged = [(event["step"], event["valid_loss"]) for event in events if event["event"] in ("epoch", "eval")]
    same("loss/valid", found("loss/valid"), judged)
    return judged


def check_histograms(program, run, files, judged):
    inspected = call(program, "inspect", str(run))
    for tensor in inspected["model"]["tensors"]:
        n_values = math.prod(tensor["shape"])
        for kind in ("parameters", "gradients"):
            found = files.Histograms(f"{kind}/{tensor['name']}")
            assert [event.step for event in found] == [step for step, _ in judged], f"{kind} of {tensor['name']}: {found}"
            for event in found:
                h = event.histogram_value
                assert h.num == n_values == sum(h.bucket), f"{tensor['name']}: {h.num} values in {sum(h.bucket)} places, not {n_values}"
                assert h.min <= h.sum / h.num <= h.max and list(h.bucket_limit) == sorted(h.bucket_limit)
    for gate, lowest in (("input", 0), ("forget", 0), ("cell", -1), ("output", 0)):
        found = files.Histograms(f"gates/l0/{gate}")
        assert [event.step for event in found] == [step for step, _ in judged], f"{gate}: {found}"
        for event in found:
            h = event.histogram_value
            assert lowest <= h.min < h.max <= 1 and h.num % 16 == 0, f"{gate}: from {h.min} to {h.max}, {h.num} values"
    # The gradient's norm is told twice, by different ways: from its sums in the ring, and from what the histograms were made of.
    norms = {event.step: event.value for event in files.Scalars("gradient_norm")}
    for step, _ in judged:
        squares = sum(
            event.histogram_value.sum_squares
            for tensor in inspected["model"]["tensors"]
            for event in files.Histograms(f"gradients/{tensor['name']}")
            if event.step == step
        )
        assert math.isclose(math.sqrt(squares), norms[step], rel_tol=1e-3), f"step {step}: norm {math.sqrt(squares)}, not {norms[step]}"


def check_texts(run, files, judged):
    texts = files.Tensors("sample")
    assert {event.step for event in texts} >= {step for step, _ in judged}, texts
    for event in texts:
        text = tensor_util.make_ndarray(event.tensor_proto)
        assert text.shape == (1,) and len(text[0]) > 20 and text[0].decode().startswith("    "), text


def check_dashboard(run):
    """The loader that the dashboard uses, which checks every record and gives each value the plugin that shows it."""
    plugins = {}
    for path in sorted((run / "tensorboard").iterdir()):
        for event in event_file_loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name:
                    plugins[value.tag] = value.metadata.plugin_data.plugin_name
    for tag, plugin in (("loss/train", "scalars"), ("sample", "text"), ("parameters/head.weight", "histograms")):
        assert plugins.get(tag) == plugin, f"{tag} is shown by {plugins.get(tag)}, not {plugin}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--carrousel", required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    text = given.work / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    run = given.work / "run"
    train = ["train", "--data", str(text), "--hidden", "16", "--layers", "1", "--seq-len", "12", "--batch-size", "4", "--devices", "cpu:1*2"]
    train += ["--log-every", "1", "--eval-every", "7", "--checkpoint-every", "10", "--tensorboard", "--out", str(run)]
    call(given.carrousel, *train, "--max-steps", "30")
    judged = check_scalars(run, accumulated(run))
    check_histograms(given.carrousel, run, accumulated(run), judged)
    check_texts(run, accumulated(run), judged)
    check_dashboard(run)

    # A start that goes back to an earlier checkpoint voids what was told beyond it.
    last = sorted((run / "checkpoints").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-8])
    call(given.carrousel, *train, "--max-steps", "35", "--resume")
    assert len(list((run / "tensorboard").iterdir())) == 2
    starts = [event["step"] for event in metrics(run) if event["event"] == "start"]
    assert starts[-1] < 30, f"the second start went on from {starts}"
    files = accumulated(run)
    check_scalars(run, files)
    same("steps", [(event.step, 0) for event in files.Scalars("loss/train")], [(step, 0) for step in range(1, 36)])
    print(f"TensorBoard reads {len(files.Tags()['scalars'])} scalars, {len(files.Tags()['histograms'])} histograms and samples of text")


if __name__ == "__main__":
    main()
