"""One process of a group: joins the others, then runs the functions that its parent names, and sends back what came."""

import contextlib
import importlib.util
import os
import pickle
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import jax
from jax._src import compiler


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def answer(function, arguments):
    try:
        return "returned", function(**arguments)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are results too
        traceback.print_exc()
        return "raised", (type(error).__name__, str(error), getattr(error, "__notes__", []))


def main(index, count, port, source, sent):
    # What a scenario prints goes to the log, beside the messages of gloo and JAX.
    sys.path.insert(0, str(Path(__file__).parent))
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    # JAX writes the programs of process 0 alone into its compile cache, and finds those of no other process there.
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    modules = {}
    with os.fdopen(source, "rb") as calls, os.fdopen(sent, "wb") as answers:
        pickle.dump("ready", answers)
        answers.flush()
        with contextlib.suppress(EOFError):
            while True:
                path, name, arguments = pickle.load(calls)
                if path not in modules:
                    modules[path] = load(path)
                print(f"--- {name} {arguments}", file=sys.stderr, flush=True)
                pickle.dump(answer(getattr(modules[path], name), arguments), answers)
                answers.flush()
    os._exit(0)  # the others may be gone, for whom the end of JAX's service would wait


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
