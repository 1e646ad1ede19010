"""Found by every interpreter of a job: ranks record their steps, and take a while for each."""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

WATCHED = "megatron.training.training"


class Finder(importlib.abc.MetaPathFinder):
    """Has the module's loader look once more when it has loaded it."""

    def find_spec(self, name, path=None, target=None):  # noqa: ANN001, ANN201
        if name != WATCHED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_record(module):  # noqa: ANN001, ANN202
            load(module)
            sys.meta_path.remove(self)
            from tests.steps import recording

            slowly = module.train_step

            def step(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
                time.sleep(float(os.environ["STEP_SECONDS"]))
                return slowly(*args, **kwargs)

            module.train_step = step
            recording(Path(os.environ["STEPS"])).__enter__()

        spec.loader.exec_module = load_and_record
        return spec


if "RANK" in os.environ and "STEPS" in os.environ:
    sys.meta_path.insert(0, Finder())
