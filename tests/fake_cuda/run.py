"""
Runs scripts on the pretended GPU: one JSON job a line on stdin, one JSON report a line on stdout.

A job is {"script": path, "argv": [...], "fault": a name in FAULTS or null}; its report has `error`, what main raised,
or null, `waits`, all that made the host wait for the device, and `waits_in_sampler`, those in the loop of self_sample.
gpu/report.py is run in the same way. test_fake_cuda.py starts it, with the library of hooks.cpp in LD_PRELOAD.
"""

import contextlib
import importlib
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from fake_cuda.device import Gpu


torch.set_num_threads(1)


def stack_before_moving(script):
    """The empty prompt comes from the text encoder, cached ones from the disk: so they lie on two devices."""
    collate_condition = script.collate_condition

    def collate(rows, device):
        torch.stack([row["prompt_embeds"] for row in rows]).to(device)
        return collate_condition(rows, device)

    return {"collate_condition": collate}


def look_at_each_timestep(script):
    """A model whose every call makes the host wait."""
    predict = script.predict

    def look(denoiser, noisy, timesteps, condition):
        timesteps[0].item()
        return predict(denoiser, noisy, timesteps, condition)

    return {"predict": look}


FAULTS = {fault.__name__: fault for fault in (stack_before_moving, look_at_each_timestep)}


def watch_sampler(script, gpu, found):
    """Adds to `found` the waits in self_sample from its first call of the model on, which is where its loop begins."""
    self_sample, predict, before = script.self_sample, script.predict, []

    def watched_sample(*args, **kwargs):
        before.append(None)
        samples = self_sample(*args, **kwargs)
        found.extend(gpu.waits[before.pop() :])
        return samples

    def watched_predict(*args, **kwargs):
        if before and before[-1] is None:
            before[-1] = len(gpu.waits)
        return predict(*args, **kwargs)

    return {"self_sample": watched_sample, "predict": watched_predict}


def run(script, argv, fault=None):
    if str(Path(script).parent) not in sys.path:
        sys.path.insert(0, str(Path(script).parent))
    script = importlib.import_module(Path(script).stem)
    if script.__name__ == "report":  # it imports when it measures; libraries that then found a GPU would look closer
        for name in ("tiny", *(f"train_sspo_{kind}" for kind in script.SCRIPTS)):
            importlib.import_module(name)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    gpu, waits_in_sampler, error = Gpu(script.__file__), [], None
    with contextlib.ExitStack() as replaced:
        if fault is not None:
            replaced.enter_context(mock.patch.multiple(script, **FAULTS[fault](script)))
        if script.__name__ != "report":
            replaced.enter_context(mock.patch.multiple(script, **watch_sampler(script, gpu, waits_in_sampler)))
        try:
            with gpu:
                script.main(script.parse_args(argv))
        except (Exception, SystemExit) as raised:
            traceback.print_exc()
            error = f"{type(raised).__name__}: {raised}"
    return dict(error=error, waits=gpu.waits, waits_in_sampler=waits_in_sampler)


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no report
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=replies, flush=True)
