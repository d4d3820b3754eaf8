"""Running a command under `phema track`: its environment, its signals, its exit code.

Loaded before every tracked command, so it loads little itself (no typer, no NumPy, no subprocess).
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

ENVIRONMENT = "PHEMA_TRACK"
EVENTS = "PHEMA_TRACK_EVENTS"
_FROM_KERNEL = 0x80
"""si_code of a signal that the terminal sent: the command has got it too, being in the same group."""


def run_tracked(options: dict[str, Any], command: Sequence[str]) -> int:
    """Run `command` with the options in its environment, and say on stderr what was tracked.

    Args:
        options: values of all options of `phema track`.
        command: the program and its arguments.

    Returns:
        The exit code of the command; 1 if it could not be started. If a signal ended the command, the
        same signal ends this process.
    """
    if not hasattr(os, "posix_spawn"):
        return _refuse(
            "it needs Linux or macOS; call posthoc_ema.torch.track in the script instead."
        )
    site = _site_folder()
    if site is None:
        return _refuse("posthoc_ema is not installed beside phema; install posthoc-ema again.")
    try:
        folder = _session_folder()
    except OSError as error:
        return _refuse(f"no temporary folder can be made ({error}). Set TMPDIR to one.")
    events = os.path.join(folder, "events")  # noqa: PTH118
    try:
        os.close(os.open(events, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        status = _spawn(command, _environment(options, site, events))
        if isinstance(status, str):
            return _refuse(status)
        _say_what_was_tracked(options, events)
    finally:
        _remove(folder, events)
    return _end_like(status)


def _say_what_was_tracked(options: dict[str, Any], events: str) -> None:
    try:
        from phema.track_report import end_lines

        lines = end_lines(options, events)
    except Exception as error:  # whatever it is: the exit code is the command's
        lines = [f"what was tracked cannot be said: {type(error).__name__}: {error}"]
    for line in lines:
        _say(line)


def _site_folder() -> str | None:
    """Folder of our sitecustomize, found without importing the library (which loads NumPy)."""
    from importlib.machinery import PathFinder

    spec = PathFinder.find_spec("posthoc_ema")
    if spec is None:
        from importlib.util import find_spec

        spec = find_spec("posthoc_ema")
    places = spec.submodule_search_locations if spec is not None else None
    return os.path.join(next(iter(places)), "torch", "launch", "site") if places else None  # noqa: PTH118


def _session_folder() -> str:
    """A new folder for the events of this run; `tempfile` would take several milliseconds to load."""
    base = next((os.environ[k] for k in ("TMPDIR", "TEMP", "TMP") if os.environ.get(k)), "/tmp")
    folder = os.path.join(  # noqa: PTH118
        os.path.abspath(base),  # noqa: PTH100
        f"phema-track-{os.getpid()}-{os.urandom(4).hex()}",
    )
    os.mkdir(folder, 0o700)  # noqa: PTH102
    return folder


def _environment(options: dict[str, Any], site: str, events: str) -> dict[str, str]:
    # The command may change its directory: what it is told does not depend on it.
    out = os.path.abspath(options["out"])  # noqa: PTH100
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": site + os.pathsep + path if path else site,
        ENVIRONMENT: repr({**options, "out": out}),  # literals; JSON would take longer to load
        EVENTS: events,
    }


def _spawn(command: Sequence[str], environment: dict[str, str]) -> int | str:
    """Run the command to its end, and pass signals on; its wait status, or why it did not start."""
    forwarded = {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
    # Python ignores these two from its start on; the command begins as it would without us.
    defaults = [
        s for s in (signal.SIGPIPE, signal.SIGXFSZ) if signal.getsignal(s) == signal.SIG_IGN
    ]
    if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, the exit code would be lost
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*forwarded, signal.SIGCHLD})
    try:
        child = os.posix_spawnp(
            command[0], list(command), environment, setsigmask=before, setsigdef=defaults
        )
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return f"{command[0]}: {error.strerror}. {_remedy(command[0])}"
    if hasattr(signal, "sigwaitinfo"):
        return _wait(child, forwarded)
    return _wait_plainly(child, forwarded)


def _wait(child: int, forwarded: set[signal.Signals]) -> int:
    while True:
        info = signal.sigwaitinfo({*forwarded, signal.SIGCHLD})
        if info.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                return status
        elif info.si_code != _FROM_KERNEL:
            os.kill(child, info.si_signo)


def _wait_plainly(child: int, forwarded: set[signal.Signals]) -> int:
    """Where a signal does not say who sent it (macOS): those of the keyboard are not passed on."""
    while True:
        number = signal.sigwait({*forwarded, signal.SIGCHLD})
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                return status
        elif not (number in (signal.SIGINT, signal.SIGQUIT) and os.isatty(0)):
            os.kill(child, number)


def _remedy(program: str) -> str:
    if program.endswith(".py"):
        return f"Write `phema track ... -- python {program}`."
    return "Check the name of the command behind `--`."


def _end_like(status: int) -> int:
    """The exit code of a wait status; a signal that ended the command ends this process as well."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    import resource

    # One core file is enough, and it is the command's.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    return 128 - code


def _remove(folder: str, events: str) -> None:
    try:
        os.unlink(events)  # noqa: PTH108
        os.rmdir(folder)  # noqa: PTH106
    except OSError:  # something else was put there; it is a temporary folder
        pass


def _refuse(message: str) -> int:
    _say(message)
    return 1


def _say(message: str) -> None:
    try:  # noqa: SIM105 - contextlib would take a tenth of the time that all this may
        os.write(2, f"phema track: {message}\n".encode("utf-8", "backslashreplace"))
    except OSError:  # stderr is closed
        pass
