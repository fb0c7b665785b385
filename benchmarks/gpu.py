"""Everything that a lent GPU should tell, in one command of at most 9 minutes.

    python benchmarks/gpu.py                 # a GPU, 9 minutes, docs/results/gpu-CARD
    python benchmarks/gpu.py --tiny          # the same code with toys on a CPU: a rehearsal of a few minutes
    python benchmarks/gpu.py --table docs/results/gpu-CARD    # README.md there, once more, of the numbers beside it

Parts run one after another in the order of their value, each in a process of its own, so that one which fails, hangs or
fills the card's memory takes nothing from the others. What a part finds is on disk at once (`PART.json`). A part starts
if its estimated cost leaves time for it and may take what the later ones do not need; what there was no time for is
named in its file. Programs are kept in `--cache`: carried along to the next card of the same kind, they need not be
compiled again.

Only the standard library is needed here; each part needs what it measures.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COSTS = {
    "ceilings": 40,
    "llava-7b": 110,
    "equality": 75,
    "embedded": 60,
    "training": 45,
    "transformers": 45,
    "qwen-7b": 70,
}
"""Part -> seconds in which it tells what is most worth knowing: an estimate, compiling included."""
GRACE = 8
"""Seconds that a part has to come to an end by itself after its time."""
RESERVE = 6
"""Seconds for the table at the end."""
NO_GPU = 3
"""Exit status of a part that finds none."""
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # 73 GiB of an H100's 79.6
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
OF_TOYS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
"""For a rehearsal, nearly all of which is compiling."""


def main(argv: Sequence[str] | None = None) -> int:
    given = parsed(argv)
    if given.table is not None:
        return table(given.table)
    if not given.tiny and shutil.which("nvidia-smi") is None and given.output is None:
        return no_gpu()
    output = given.output or (Path("runs/gpu-tiny") if given.tiny else ROOT / "docs/results" / f"gpu-{card()}")
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # which ends the part that runs, too
    ends = time.monotonic() + 60 * given.minutes - RESERVE
    parts = [name for name in COSTS if name in given.parts]
    for number, name in enumerate(parts):
        later = sum(cost(each, given.tiny) for each in parts[number + 1 :])
        left = ends - time.monotonic()
        if left < cost(name, given.tiny):
            why = f"it takes about {cost(name, given.tiny):.0f} s, {max(left, 0):.0f} were left"
            tell(output, name, "left out", why)
            continue
        if run(name, max(cost(name, given.tiny), left - later), output, given) == NO_GPU:
            (output / f"{name}.json").unlink(missing_ok=True)
            return no_gpu()
    return table(output)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder of the results (default: docs/results/gpu-CARD)")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take (default: 9)")
    names = ", ".join(COSTS)
    parser.add_argument("--parts", nargs="+", metavar="PART", default=list(COSTS), help=f"of {names} (default: all)")
    parser.add_argument("--no-profile", action="store_true", help="do not record where a step and a round spend time")
    parser.add_argument("--cache", type=Path, default=Path("runs/gpu-cache"), help="folder of compiled programs")
    parser.add_argument("--tiny", action="store_true", help="toys, on whatever there is")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only write FOLDER/README.md")
    given = parser.parse_args(argv)
    if not given.minutes > 0:
        parser.error(f"--minutes must be above 0, got {given.minutes:g}")
    if unknown := [name for name in given.parts if name not in COSTS]:
        parser.error(f"--parts must be among {names}, got {unknown[0]}")
    if given.table is not None and not given.table.is_dir():
        parser.error(f"--table needs a folder of results, {given.table} is none")
    return given


def cost(part: str, tiny: bool) -> float:
    return 5.0 if tiny else COSTS[part]


def no_gpu() -> int:
    print(
        "benchmarks/gpu.py needs a GPU and found none (is jax[cuda12] or jax[cuda13] installed?); --tiny rehearses it",
        file=sys.stderr,
    )
    return NO_GPU


def card() -> str:
    """The first card's name as a folder's: `h100-80gb-hbm3`."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    name = said.strip().splitlines()[0] if said.strip() else "unknown"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def run(name: str, seconds: float, output: Path, given: argparse.Namespace) -> int:
    """A part in a process of its own, ended where it does not end by itself; its exit status."""
    file = output / f"{name}.json"
    file.unlink(missing_ok=True)
    environment = ENVIRONMENT | (OF_TOYS if given.tiny else {}) | os.environ
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(given.cache.resolve()))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.gpu_parts", name, "--file", str(file), "--seconds", str(seconds)]
    command += ["--tiny"] * given.tiny + ["--profile"] * (not given.no_profile)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    why = ""
    try:
        status = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        why = f"it was still busy {GRACE} s after its {seconds:.0f} s and was ended"
        status = end(process)
    except BaseException:
        end(process)
        raise
    if status < 0 and not why:
        why = f"its process was killed by {signal.Signals(-status).name}"
    if why or (status != NO_GPU and not file.exists()):
        tell(output, name, "partial", why or f"its process ended with status {status} before it could tell anything")
    file.with_name(file.name + ".tmp").unlink(missing_ok=True)
    return status


def end(process: subprocess.Popen) -> int:
    """The process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def tell(output: Path, name: str, status: str, why: str) -> None:
    """Adds to what a part has written, if anything, why there is no more of it. What an earlier run found stays as it
    is where this one has left the part out."""
    print(f"{name}: {why}", flush=True)
    file = output / f"{name}.json"
    if status == "left out" and file.exists():
        return
    told = json.loads(file.read_text()) if file.exists() else {"part": name, "rows": [], "errors": [], "left_out": []}
    told["status"] = status if status == "left out" or told["rows"] else "failed"
    told["left_out" if status == "left out" else "errors"].append(f"{name}: {why}")
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(told, indent=1) + "\n")
    temporary.replace(file)


def table(folder: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu_parts.table import write_table

    return write_table(folder)


if __name__ == "__main__":
    sys.exit(main())
