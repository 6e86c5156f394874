import os
import threading
import time

import pytest
import torch

from gpt2core.resources import ResourceMeter, mean_utilization, peak_memory_mib


def test_the_meter_measures_work_and_the_largest_memory_since_it_was_read():
    before = threading.active_count()
    with ResourceMeter(torch.device("cpu")) as meter:
        start, cpu = time.perf_counter(), time.process_time()
        block = bytearray(os.urandom(1)) * (100 * 2**20)  # every page is written
        time.sleep(0.5)  # the thread takes a sample
        del block
        share = (time.process_time() - cpu) / (time.perf_counter() - start) / os.cpu_count()
        first, second = meter.read(), meter.read()
    assert first.keys() == {"system/cpu_utilization", "system/memory_mib"}
    assert first["system/cpu_utilization"] == pytest.approx(share, abs=0.2)
    assert first["system/memory_mib"] - second["system/memory_mib"] > 50
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([], (None, None)),
        ([{"step": 1, "val/loss": 1.0}], (None, None)),
        (
            [{"system/cpu_utilization": 0.25, "system/memory_mib": 9.0}, {"system/cpu_utilization": 0.75}],
            (0.5, 9.0),
        ),
        (
            [
                {"system/cpu_utilization": 0.1, "system/gpu_utilization": 0.5, "system/gpu_memory_mib": 3.0},
                {"system/cpu_utilization": 0.1, "system/gpu_utilization": 1.0, "system/gpu_memory_mib": 2.0},
            ],
            (0.75, 3.0),
        ),
    ],
)
def test_the_gpus_values_stand_for_a_training_that_has_them(history, expected):
    assert (mean_utilization(history), peak_memory_mib(history)) == expected
