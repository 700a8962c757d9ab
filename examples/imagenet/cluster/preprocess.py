#!/usr/bin/env python
"""Makes a job script from a configuration file, and prints its path.

    python preprocess.py [--conf config.yaml] [--out main.sh] [--scheduler NAME]
    python preprocess.py --dry-run          shows the script and writes nothing
    python preprocess.py --submit           submits it as well (what ./submit does)

The script, the configuration and a copy of the code go to a new folder ``<out>/<time>``.
Everything is checked before anything is written. See docs/cluster.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

TRAINER = Path(__file__).resolve().parents[1]
if str(TRAINER) not in sys.path:
    sys.path.insert(0, str(TRAINER))

from config import Config, Job, read_file  # noqa: E402
from config.job import Scheduler  # noqa: E402
from errors import InputError  # noqa: E402

from cluster.checks import check_files, check_logs, check_network, check_time  # noqa: E402
from cluster.folder import copy_code, make_folder  # noqa: E402
from cluster.plan import Plan, make_plan  # noqa: E402
from cluster.script import render, submit_command  # noqa: E402

HERE = Path(__file__).resolve().parent
SCHEDULERS = get_args(Scheduler)


def find_configuration(name: str) -> Path:
    """Returns the configuration file of that name.

    Args:
        name: A path, or the name of a file in ``.config`` here or beside this program.

    Raises:
        InputError: There is none.
    """
    candidates = [Path(name), Path(".config") / name, HERE / ".config" / name]
    for path in candidates:
        if path.is_file():
            return path
    looked = ", ".join(map(str, dict.fromkeys(candidates)))
    raise InputError(f"--conf {name}: no such file (looked for {looked})")


def find_modules(job: Job, plan: Plan) -> Path | None:
    """Returns the file that the job sources for its modules.

    It is for the configuration's scheduler: where another one stands in, there is none.

    Raises:
        InputError: The configuration names one that is not there.
    """
    given = "modules" in job.model_fields_set
    if job.modules is None or plan.scheduler != job.scheduler:
        return None
    for path in (job.modules, HERE / job.modules):
        if path.is_file():
            return path.resolve() if given or plan.scheduler == "tsubame" else None
    if not given and plan.scheduler != "tsubame":
        return None
    raise InputError(
        f"modules {job.modules}: no such file; write one with the `module load` commands of your "
        f"cluster, or set modules to null"
    )


def prepare(
    conf: Path, out: str, scheduler: str | None = None
) -> tuple[Plan, Job, Config, Path | None]:
    """Reads and checks a configuration.

    Args:
        conf: The configuration file.
        out: Name or path of the job script.
        scheduler: Stands in for the configuration's.

    Returns:
        The job in numbers, the two parts of the configuration, and the file of modules.

    Raises:
        InputError: Something in it, or a file that it names, cannot be used.
    """
    config, job = read_file(conf)
    plan = make_plan(job, config, scheduler)
    check_time(plan, job)
    check_logs(plan, job)
    check_network(config)
    check_files(config)
    modules = find_modules(job, plan)
    if Path(out).name != out and Path(out).exists():
        raise InputError(f"--out {out}: exists already; remove it or choose another name")
    if Path(out).name != out and not Path(out).parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {Path(out).parent}; create it")
    return plan, job, config, modules


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="preprocess.py",
        description="Make a job script from a configuration file, and print its path.",
    )
    add = parser.add_argument
    add("--conf", default="config.yaml", metavar="FILE",
        help="YAML or JSON file: a path, or a name in .config (default config.yaml)")  # fmt: skip
    add("--out", default="main.sh", metavar="FILE",
        help="the job script: a name in the job's folder, or a path (default main.sh)")  # fmt: skip
    add("--scheduler", choices=SCHEDULERS,
        help="instead of the configuration's, whose others and modules do not count then")  # fmt: skip
    add("--dry-run", action="store_true", help="show the script and write nothing")
    add("--submit", action="store_true", help="submit it; with scheduler local, run it here")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status (2: an input cannot be used)."""
    args = _parse(argv)
    try:
        return _run(args)
    except InputError as e:
        print(f"preprocess.py: error: {e}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    conf = find_configuration(args.conf)
    plan, job, config, modules = prepare(conf, args.out, args.scheduler)

    def text(folder: Path) -> str:
        return render(
            plan,
            job,
            conf=conf,
            settings=f"config{conf.suffix}",
            folder=folder,
            cwd=Path.cwd(),
            modules=modules,
            python=job.python or sys.executable,
        )

    if args.dry_run:
        folder = (config.out / "TIME").resolve()
        print(text(folder), end="")
        script = folder / args.out if Path(args.out).name == args.out else Path(args.out)
        command = submit_command(plan, job, script)
        print(f"would be submitted with: {shlex.join(command)}", file=sys.stderr)
        return 0
    text(Path("/"))  # what cannot be rendered must not leave a folder behind
    program = submit_command(plan, job, Path(args.out))[0]
    if args.submit and shutil.which(program) is None:
        raise InputError(
            f"scheduler {plan.scheduler}: there is no {program} on this machine; submit from a "
            f"login node of the cluster, or use --scheduler local to run here"
        )
    folder = make_folder(config.out)
    import chainer_ooc

    copy_code(TRAINER, Path(chainer_ooc.__file__).parent, folder)
    shutil.copyfile(conf, folder / f"config{conf.suffix}")
    script = folder / args.out if Path(args.out).name == args.out else Path(args.out).resolve()
    with open(script, "x", encoding="utf-8") as f:
        f.write(text(folder))
    script.chmod(0o755)
    print(script, flush=True)
    if args.submit:
        command = submit_command(plan, job, script)
        os.execvp(command[0], command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
