"""Measures one side in a fresh process."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch
from meter import Meter
from safetensors.torch import save_file


def main(request_file: str) -> None:
    """Run the side that a file names, once to warm up where the file says so, then measured.

    The answer, the results and what was printed go to the files that the request names.
    """
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    printed = os.open(request["printed"], os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(printed, stream.fileno())
    side = getattr(importlib.import_module(request["module"]), request["function"])
    if request["warm"] is not None:
        side(Meter(request["device"], request["dtype"]), **request["warm"])
    meter = Meter(request["device"], request["dtype"])
    results = side(meter, **request["parameters"]) or {}
    # `clone`: a sample of a large tensor must not be written with the whole of it.
    save_file({name: value.detach().double().cpu().clone() for name, value in results.items()}, request["results"])
    answer = {
        "seconds": meter.seconds,
        "units": meter.units,
        "bytes": meter.bytes,
        "threads": torch.get_num_threads(),
    }
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
