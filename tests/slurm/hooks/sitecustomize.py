"""Found by every interpreter of a job: ranks record their steps, and take a while for each."""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path
from typing import Any

WATCHED = "megatron.training.training"
KEPT: list[Any] = []


class Finder(importlib.abc.MetaPathFinder):
    """Has the module's loader look once more when it has loaded it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != WATCHED:
            return None
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_record(module: Any) -> None:
            load(module)
            sys.meta_path.remove(self)
            from tests.steps import recording

            slowly = module.train_step

            def step(*args: Any, **kwargs: Any) -> Any:
                time.sleep(float(os.environ["STEP_SECONDS"]))
                return slowly(*args, **kwargs)

            module.train_step = step
            # Held as long as the process lives: it would end when nobody holds it.
            self.recording = recording(Path(os.environ["STEPS"]))
            self.recording.__enter__()
            KEPT.append(self)

        spec.loader.exec_module = load_and_record
        return spec


if "RANK" in os.environ and "STEPS" in os.environ:
    sys.meta_path.insert(0, Finder())
