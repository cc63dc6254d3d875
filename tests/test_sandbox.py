"""Programs that try to get out, and what keeps them in: as root and as an ordinary user.

Each row of the escape set is a test of its own, `test_case_53_...`; `test_eval_cases.py` has a model write them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from packcli.errors import MissingError, RunError
from packcli.eval.sandbox import guest, sandbox
from packcli.eval.sandbox.sandbox import Outcome, Sandbox

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[1]
NOBODY = 65534
SECRET = "s3cret-" + secrets.token_hex(8)
HELPER = """
import json, sys
from packcli.eval.sandbox import sandbox
boxes = {True: sandbox.find(), False: sandbox.find(unsafe=True)}
print(json.dumps(boxes[True].name), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    done = boxes[order["confined"]].run(order["program"], timeout_s=order["timeout_s"])
    print(json.dumps([done.passed, done.why, done.detail, done.wall_s]), flush=True)
"""


# The machine: bubblewrap, a user, and what of the host an escape would reach. ----------------------------------


class User:
    """A process that runs programs for us, with a secret in its environment, as root or as someone else."""

    def __init__(self, python: str, package: Path, **who: Any) -> None:
        self.process = subprocess.Popen(
            [python, "-B", "-c", HELPER],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(package),
                "OPENAI_API_KEY": SECRET,
                "HF_TOKEN": SECRET,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            **who,
        )
        self.name = json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the process that starts sandboxes has died"
        return line

    def ask(self, program: str, *, timeout_s: float = 5.0, confined: bool = True) -> None:
        assert self.process.stdin is not None
        order = {"program": textwrap.dedent(program), "timeout_s": timeout_s, "confined": confined}
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def run(self, program: str, *, timeout_s: float = 5.0, confined: bool = True) -> Outcome:
        begun_s = time.monotonic()
        self.ask(program, timeout_s=timeout_s, confined=confined)
        outcome = Outcome(*json.loads(self._answer()))
        assert time.monotonic() - begun_s < timeout_s + 20  # the start of a sandbox on a loaded machine
        return outcome

    def close(self) -> None:
        with self.process:
            self.process.kill()


@pytest.fixture(scope="module")
def ordinary(bwrap: str) -> Iterator[Callable[[], User]]:
    """Starts a `User` who is not root: the one who runs the tests or, if that is root, `nobody`."""
    if os.geteuid() != 0:
        yield lambda: User(sys.executable, REPO)
        return
    ask = [sandbox._SYSTEM_PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not Path(ask[0]).exists() or subprocess.run(ask, check=False).returncode:
        pytest.skip("nobody can run this Python, and the system has none that is new enough")
    with tempfile.TemporaryDirectory() as name:  # neither checkout nor Python need be open to everybody
        shutil.copytree(REPO / "packcli", Path(name, "packcli"), ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        yield lambda: User(ask[0], Path(name), user=NOBODY, group=NOBODY, extra_groups=[])


@pytest.fixture(scope="module", params=["root", "ordinary user"])
def start(request: pytest.FixtureRequest, bwrap: str) -> Callable[[], User]:
    if request.param == "ordinary user":
        made: Callable[[], User] = request.getfixturevalue("ordinary")
        return made
    if os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    return lambda: User(sys.executable, REPO)


@pytest.fixture(scope="module")
def user(start: Callable[[], User]) -> Iterator[User]:
    made = start()
    yield made
    made.close()


class Host:
    """What an escape would reach. Everybody may do everything with it: only the sandbox stands in the way."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o777)
        (directory / "secret").write_text(SECRET)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(f"\0packcli-{SECRET}")
        self.path = socket.socket(socket.AF_UNIX)
        self.path.bind(str(directory / "socket"))
        (directory / "socket").chmod(0o777)
        for server in self.servers:
            server.listen()
            server.setblocking(False)

    @property
    def servers(self) -> tuple[socket.socket, ...]:
        return self.tcp, self.unix, self.path

    def visitors(self) -> int:
        found = 0
        for server in self.servers:
            with contextlib.suppress(BlockingIOError):
                server.accept()[0].close()
                found += 1
        return found


@pytest.fixture
def host() -> Iterator[Host]:
    with tempfile.TemporaryDirectory() as name:
        made = Host(Path(name))
        yield made
        for server in made.servers:
            server.close()


def running(marker: str) -> list[int]:
    """The host's processes that have `marker` on their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if marker in file.read_text():
                found.append(int(file.parent.name))
    return found


def status(process: int) -> list[str]:
    return Path(f"/proc/{process}/status").read_text().splitlines()


def wait_until(true: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


# Escapes. A program passes if it got out. Those of `REACHES` do so without a sandbox, which is tested, too. ------

REACHES = {
    "a server on the host's loopback": "socket.create_connection(('127.0.0.1', {port}), 2)",
    "an abstract socket of the host": "socket.socket(socket.AF_UNIX).connect('\\0packcli-{secret}')",
    "a socket file of the host": "socket.socket(socket.AF_UNIX).connect('{directory}/socket')",
    "a file of the host": "assert open('{directory}/secret').read() == '{secret}'",
    "/etc/passwd": "open('/etc/passwd')",
    "a new file on the host": "open('{directory}/new', 'w')",
    "the environment of other processes": "assert '{secret}' in everything('environ')",
    "the command lines of other processes": "assert 'boxes[True]' in everything('cmdline')",
    "another process": "os.kill({pid}, 0)",
    "a new user namespace": "assert ctypes.CDLL(None).unshare(0x10000000) == 0",
}
PREAMBLE = """
import ctypes, glob, os, signal, socket, subprocess, sys, time

def everything(name):
    found = ''
    for path in glob.glob(f'/proc/[0-9]*/{name}'):
        try:
            found += open(path, errors='replace').read()
        except OSError:
            pass
    return found

"""


def attack(name: str, host: Host, user: User) -> str:
    port = host.tcp.getsockname()[1]
    return PREAMBLE + REACHES[name].format(
        port=port, directory=host.directory, secret=SECRET, pid=user.process.pid
    )


@pytest.mark.parametrize("name", REACHES)
def test_case_53_no_program_reaches(name: str, user: User, host: Host) -> None:
    outcome = user.run(attack(name, host, user))
    assert outcome.why == "failed", outcome
    assert outcome.detail.split(":")[0] in {
        "AssertionError", "ConnectionRefusedError", "FileNotFoundError", "ProcessLookupError",
    }, outcome  # fmt: skip
    assert host.visitors() == 0
    assert not (host.directory / "new").exists()


@pytest.mark.parametrize("name", REACHES)
def test_without_a_sandbox_the_same_program_does_reach(
    name: str, host: Host, ordinary: Callable[[], User], lonely: list[User]
) -> None:
    """Or its failure inside would show nothing."""
    if not lonely:
        lonely.append(ordinary())
    outcome = lonely[0].run(attack(name, host, lonely[0]), confined=False)
    if name == "a new user namespace" and not outcome.passed:
        pytest.skip("only bubblewrap may make user namespaces here")
    assert outcome.passed, outcome


@pytest.fixture(scope="module")
def lonely() -> Iterator[list[User]]:
    made: list[User] = []
    yield made
    for user in made:
        user.close()


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("socket.create_connection(('1.1.1.1', 53), 3)", "OSError: [Errno 101] Network is unreachable"),
        ("socket.getaddrinfo('example.org', 80)", "socket.gaierror"),
        ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))", "OSError: [Errno 101]"),
    ],
    ids=["1.1.1.1", "DNS", "UDP"],
)
def test_case_53_no_program_reaches_the_internet(program: str, error: str, user: User) -> None:
    outcome = user.run(PREAMBLE + program)
    assert (outcome.why, outcome.detail[: len(error)]) == ("failed", error)


def test_case_53_nothing_of_the_host_can_be_written_but_its_own_tmp(user: User) -> None:
    mark = f"packcli-{secrets.token_hex(8)}"
    program = f"""
        import os
        os.chdir("/tmp")
        written = []
        for where in ("/", "/root", "/etc", "/usr", "/usr/lib", "/home", "/var/tmp", "/dev", "/proc", "/sys"):
            try:
                open(where + "/{mark}", "w")
                written.append(where)
            except OSError:
                pass
        assert not written, written
        for where in (".", "/tmp", "/dev/shm"):
            open(where + "/{mark}", "w").write("own")
    """
    outcome = user.run(program)
    assert outcome.passed, outcome
    places = ("/", "/root", "/etc", "/usr", "/usr/lib", "/home", "/var/tmp", "/dev", "/tmp", "/dev/shm")
    assert [place for place in places if os.path.lexists(f"{place}/{mark}")] == []


def test_the_root_directory_shows_programs_and_nothing_else(user: User) -> None:
    program = """
        import os
        allowed = {"usr", "bin", "lib", "lib32", "lib64", "etc", "proc", "dev", "tmp"}
        assert set(os.listdir("/")) <= allowed, os.listdir("/")
        assert set(os.listdir("/etc") if os.path.exists("/etc") else ()) <= {"ld.so.cache"}
        assert os.listdir("/tmp") == os.listdir("/dev/shm") == []
    """
    if not Path(sandbox._python().path).is_relative_to("/usr"):
        pytest.skip("here the Python that runs programs lies outside /usr")
    outcome = user.run(program)
    assert outcome.passed, outcome


def test_case_53_no_process_holds_a_variable_that_is_not_the_sandboxs_own(user: User) -> None:
    """/proc/1/environ is bubblewrap's own: `--clearenv` alone leaves the caller's there."""
    program = PREAMBLE + (
        "assert glob.glob('/proc/1/environ')\n"
        "names = {entry.split('=')[0] for entry in everything('environ').split('\\0')} | set(os.environ)\n"
        "assert names <= {'', 'PYTHONHASHSEED', 'PWD', 'LC_CTYPE'}, names\n"
        f"assert {SECRET!r} not in everything('environ') + everything('cmdline')\n"
    )
    outcome = user.run(program)
    assert outcome.passed, outcome


def test_case_53_a_program_has_no_rights_and_cannot_get_any(user: User) -> None:
    program = PREAMBLE + textwrap.dedent("""
        status = open('/proc/self/status').read()
        for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'):
            assert f'{name}:\\t0000000000000000' in status, name
        assert 'NoNewPrivs:\\t1' in status
        assert os.getuid() == os.geteuid() == os.getgid() == 65534
        assert subprocess.run(['unshare', '--user', 'true'], stderr=subprocess.DEVNULL).returncode
        for call in ('setuid', 'setgid', 'chroot'):
            try:
                getattr(os, call)('/' if call == 'chroot' else 0)
            except OSError:
                continue
            raise ValueError(call)
    """)
    outcome = user.run(program)
    assert outcome.passed, outcome


def test_case_53_a_program_that_kills_everything_kills_only_itself(user: User) -> None:
    marker = f"86399.{secrets.randbelow(10**9)}"
    who: dict[str, Any] = {"user": NOBODY} if os.geteuid() == 0 else {}
    with subprocess.Popen(["sleep", marker], **who) as bystander:
        program = f"""
            import os, signal
            for victim in ({user.process.pid}, {bystander.pid}, os.getppid(), 1, -1):
                for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL):
                    try:
                        os.kill(victim, number)
                    except OSError:
                        pass
        """
        outcome = user.run(program)
        assert outcome.why in {"passed", "killed"}, outcome  # all it can see is itself
        assert bystander.poll() is None
        assert user.process.poll() is None
        assert user.run("1").passed
        bystander.kill()


# Too much of something. ----------------------------------------------------------------------------------------


def test_case_53_a_fork_bomb_stops_at_a_few_processes(user: User) -> None:
    outcome = user.run(
        f"""
        import os, time
        count = 0
        try:
            while count < 100:
                if os.fork() == 0:
                    time.sleep(60)
                    os._exit(0)
                count += 1
        except BlockingIOError:
            pass
        assert count < {guest.PROCESSES}, count
        """
    )
    assert outcome.passed, outcome
    bomb = """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """
    assert user.run(bomb, timeout_s=1).why == "timeout"
    assert user.run("1").passed


def test_threads_count_as_processes(user: User) -> None:
    program = """
        import threading, time
        for _ in range(100):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """
    outcome = user.run(program)
    assert (outcome.why, outcome.detail) == ("failed", "RuntimeError: can't start new thread")


def test_case_53_an_allocation_of_10_gb_fails(user: User) -> None:
    outcome = user.run("bytearray(10 * 2**30)")
    assert (outcome.why, outcome.detail) == ("failed", "MemoryError")


def test_case_53_twelve_children_of_700_mb_hold_nothing(user: User) -> None:
    program = """
        import os, time
        heard, said = os.pipe()
        for _ in range(12):
            try:
                if os.fork():
                    continue
            except BlockingIOError:
                continue
            try:
                held = b"x" * (700 * 2**20)
                os.write(said, b"held ")
                time.sleep(60)
            finally:
                os._exit(0)
        os.close(said)
        assert os.read(heard, 100), "no child could hold 700 MB"
    """
    outcome = user.run(program)
    assert (outcome.why, outcome.detail) == ("failed", "AssertionError: no child could hold 700 MB")


def test_what_all_processes_hold_together_is_what_workers_are_counted_by() -> None:
    together = guest.PROCESSES * guest.MEMORY_BYTES + sandbox._TMP_BYTES + sandbox._SHM_BYTES
    first = guest.MEMORY_BYTES  # the sandbox's own first process counts as one, and holds next to nothing
    assert together - first <= sandbox.WORST_CASE_BYTES


def test_case_53_an_endless_loop_that_ignores_signals_ends_in_time(user: User) -> None:
    program = """
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass
    """
    outcome = user.run(program, timeout_s=1)
    assert (outcome.why, outcome.detail) == ("timeout", "did not end in 1 s")
    assert 1 <= outcome.wall_s < 5


def test_a_program_that_sleeps_is_not_waited_for(user: User) -> None:
    """No limit on CPU time ends it."""
    assert user.run("import time; time.sleep(600)", timeout_s=0.5).why == "timeout"


def test_case_53_a_gigabyte_of_output_is_not_read_to_its_end(user: User) -> None:
    """Nor kept: of what was read, packcli holds a few kilobytes."""
    outcome = user.run("for _ in range(2**10): print('x' * 2**20, flush=True)", timeout_s=20)
    assert outcome.why == "output"
    peak_kb = next(line for line in status(user.process.pid) if line.startswith("VmHWM:")).split()[1]
    assert int(peak_kb) < 200_000


@pytest.mark.parametrize("file", [1, 2, "channel"])
def test_case_53_output_without_end_is_cut_off(file: object, user: User) -> None:
    program = f"""
        import os, sys
        file = {file!r} if {file!r} != "channel" else int(sys.argv[1])
        while True:
            os.write(file, b"x" * 2**20)
    """
    outcome = user.run(program, timeout_s=20)
    assert outcome.why == "output"
    assert outcome.wall_s < 20  # a gigabyte would take less
    assert len(outcome.detail) <= 200


def test_output_below_the_limit_is_no_failure(user: User) -> None:
    assert user.run("print('x' * 2**19)").passed


def test_case_53_a_file_of_2_gb_and_4000_small_ones_fail(user: User) -> None:
    large = user.run("file = open('/tmp/large', 'wb')\nfor _ in range(2**11): file.write(b'x' * 2**20)")
    assert (large.why, large.detail) == ("failed", "OSError: [Errno 27] File too large")
    sparse = user.run("open('/tmp/large', 'wb').truncate(2 * 2**30)")
    assert sparse.detail == "OSError: [Errno 27] File too large"
    many = user.run("for n in range(4000): open(f'/tmp/{n}', 'wb').write(b'x' * 2**17)")
    assert (many.why, many.detail) == ("failed", "OSError: [Errno 28] No space left on device")
    shared = user.run("for n in range(4000): open(f'/dev/shm/{n}', 'wb').write(b'x' * 2**17)")
    assert shared.detail == "OSError: [Errno 28] No space left on device"


def test_case_53_a_daemon_is_gone_when_its_program_has_ended(user: User) -> None:
    marker = f"86398.{secrets.randbelow(10**9)}"
    program = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execv("/bin/sleep", ["sleep", "{marker}"])
            os._exit(0)
        time.sleep(1)
    """
    user.ask(program)
    assert wait_until(lambda: bool(running(marker)))
    outcome = Outcome(*json.loads(user._answer()))
    assert outcome.passed
    assert outcome.wall_s < 5
    assert wait_until(lambda: not running(marker))


def test_programs_die_with_whoever_ran_them(start: Callable[[], User]) -> None:
    """An evaluation that is killed leaves no model-written code behind."""
    marker = f"86397.{secrets.randbelow(10**9)}"
    owner = start()
    owner.ask(f"import os; os.execv('/bin/sleep', ['sleep', '{marker}'])", timeout_s=600)
    assert wait_until(lambda: bool(running(marker)))
    owner.close()
    assert wait_until(lambda: not running(marker))


# Success that is none. -----------------------------------------------------------------------------------------

FORGED = {
    "leaves early with status 0": "import os; os._exit(0)",
    "raises SystemExit": "raise SystemExit(0)",
    "says passed": "import os; print('passed', flush=True); os._exit(0)",
    "stops itself": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "replaces itself": "import os; os.execv('/bin/true', ['true'])",
    "leaves by an exit handler": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "has a thread leave": """
        import os, threading, time
        threading.Thread(target=os._exit, args=(0,)).start()
        time.sleep(4)
    """,
    "writes to all files": """
        import os
        for file in range(64):
            try:
                os.write(file, b'passed')
            except OSError:
                pass
        os._exit(0)
    """,
    "guesses the form of the last word": """
        import os
        for file in range(3, 64):
            try:
                os.write(file, b'0' * 32)
            except OSError:
                pass
        os._exit(0)
    """,
    "goes on after writing": """
        import os
        for file in range(3, 64):
            try:
                os.write(file, b'+')
            except OSError:
                pass
    """,
}


@pytest.mark.parametrize("name", FORGED)
def test_case_53_no_pass_for_a_program_that(name: str, user: User) -> None:
    outcome = user.run(FORGED[name])
    assert not outcome.passed
    assert outcome.why in {"failed", "killed"}


def test_the_last_word_is_in_no_argument_variable_file_or_frame(
    bwrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a program that takes Python's own objects apart finds it."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0123456789abcdef" * 2)
    program = PREAMBLE + textwrap.dedent("""
        word = ''.join('0123456789abcdef' for _ in range(2))
        assert word not in everything('cmdline') + everything('environ') + repr(sys.argv) + repr(dict(os.environ))
        assert sys.stdin.read() == ''
        for path in glob.glob('/proc/*/fd/*') + glob.glob('/tmp/**', recursive=True):
            try:
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                assert word.encode() not in os.read(file, 2**16), path
            except OSError:
                pass
        names, frame = [], sys._getframe().f_back  # this one holds `word`
        while frame:
            names.append(frame.f_code.co_name)
            assert word not in repr(frame.f_locals.values()), frame
            frame = frame.f_back
        assert 'main' in names
    """)
    outcome = sandbox.find().run(program)
    assert outcome.passed, outcome


# What counts as a program's end, and what is written down of it. -----------------------------------------------


def test_what_a_program_meets_is_the_same_each_time(user: User) -> None:
    """Or a score would change from run to run of the same answers."""
    program = "import random; raise ValueError(hash('packcli'), random.random())"
    details = {user.run(program).detail for _ in range(3)}
    assert len(details) == 1
    assert next(iter(details)).startswith("ValueError: (")


def test_only_the_standard_library_is_there(user: User) -> None:
    assert user.run("import pip").detail == "ModuleNotFoundError: No module named 'pip'"
    assert user.run("import ctypes, dataclasses, decimal, hashlib, multiprocessing, sqlite3, zoneinfo").passed


def test_the_sandboxs_own_way_of_reading_source_does_not_leak_into_the_program(user: User) -> None:
    """`from __future__ import annotations` in the file that runs it would change what annotations are."""
    program = """
        from dataclasses import dataclass
        @dataclass
        class Point:
            x: int
        assert Point.__annotations__ == {"x": int}
        assert Point(1) == Point(1)
        if __name__ == "__main__":
            raise ValueError("no scorer of this benchmark runs this")
    """
    assert user.run(program).passed


@pytest.mark.parametrize("source", ["\ud800", "x = '\0'", "def", "(" * 10_000, "def f():\nreturn", "# é\n1/0"])
def test_source_that_is_no_python_is_a_failed_program(source: str, user: User) -> None:
    outcome = user.run(source)
    assert (outcome.passed, outcome.why) == (False, "failed")


def test_control_characters_of_an_error_do_not_reach_the_terminal(user: User) -> None:
    outcome = user.run(r"raise ValueError('\x1b[31mred\x07' + 'x' * 1000)")
    assert outcome.detail.startswith(r"ValueError: \x1b[31mred\x07xxx")
    assert len(outcome.detail) == 200


def test_the_error_is_told_where_the_program_put_stderr_aside(user: User) -> None:
    outcome = user.run("import io, sys; sys.stdout = sys.stderr = io.StringIO(); 1 / 0")
    assert outcome.detail == "ZeroDivisionError: division by zero"


def test_a_program_that_reads_finds_no_input(user: User) -> None:
    assert user.run("input()").detail == "EOFError: EOF when reading a line"


def test_a_crash_of_the_interpreter_is_a_killed_program(user: User) -> None:
    assert user.run("import os; os.abort()").why == "killed"


def test_outcomes_come_in_the_order_of_the_programs(bwrap: str) -> None:
    programs = [f"import time; time.sleep({0.3 if n == 0 else 0}); raise ValueError({n})" for n in range(12)]
    noted: list[tuple[int, int, str]] = []
    outcomes = sandbox.find().run_all(programs, workers=4, note=lambda *told: noted.append(told))
    assert [outcome.detail for outcome in outcomes] == [f"ValueError: {n}" for n in range(12)]
    assert noted == [(n, 12, "") for n in range(1, 13)]


# Choosing a sandbox, and refusing one that does not hold. ------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Puts a script in bubblewrap's place, open to whoever the sandbox is started as."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)

        def put(script: str) -> Path:
            path = Path(name, "bwrap")
            path.write_text("#!/bin/bash\n" + textwrap.dedent(script))
            path.chmod(0o755)
            monkeypatch.setenv("PATH", name)
            return path

        yield put


def test_without_bubblewrap_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingError) as caught:
        sandbox.find()
    assert caught.value.exit_code == 6
    assert "apt install bubblewrap" in caught.value.fix
    assert "--unsafe-no-sandbox" in caught.value.fix


def test_a_sandbox_that_is_none_is_refused_with_what_it_let_through(fake: Callable[[str], Path]) -> None:
    fake("""
        [ "$1" = --version ] && echo "bubblewrap 0.8.0" && exit
        while [ "$1" != --remount-ro ]; do shift; done
        shift 4
        exec "$@"
    """)
    with pytest.raises(MissingError, match="is refused") as caught:
        sandbox.find()
    assert caught.value.exit_code == 6
    for finding in ("network", "read", "write", "processes"):
        assert sandbox._FINDINGS[finding] in caught.value.cause


@pytest.mark.parametrize(
    ("finding", "word", "instead"),
    [
        ("network", "--hostname", "--share-net --hostname"),
        ("namespace", "--disable-userns", ""),
        ("capabilities", "--new-session", "--new-session --cap-add CAP_SYS_ADMIN"),
        ("environment", "--new-session", "--new-session --setenv HF_TOKEN x"),
        ("read", "--proc", "--ro-bind /etc /etc --proc"),
        ("write", "--chdir", "--bind /tmp /tmp --chdir"),
    ],
)
def test_one_hole_is_enough_to_be_refused(
    finding: str, word: str, instead: str, bwrap: str, fake: Callable[[str], Path]
) -> None:
    fake(f"""
        words=()
        for word in "$@"; do
            if [[ $word == {word} ]]; then words+=({instead}); else words+=("$word"); fi
        done
        exec {bwrap} "${{words[@]}}"
    """)
    with pytest.raises(MissingError, match="is refused") as caught:
        sandbox.find()
    assert sandbox._FINDINGS[finding] in caught.value.cause


def test_the_callers_environment_behind_bubblewraps_own_process_is_found(
    bwrap: str, fake: Callable[[str], Path]
) -> None:
    """Where packcli itself passed it on, `--clearenv` or not."""
    fake(f'HF_TOKEN=x exec {bwrap} --clearenv "$@"')
    with pytest.raises(MissingError) as caught:
        sandbox.find()
    assert caught.value.cause.endswith(f"is refused: a program could {sandbox._FINDINGS['environment']}")


def test_as_root_a_sandbox_that_keeps_root_is_refused(bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts no processes of the real root: a fork bomb would not stop."""
    if os.geteuid() != 0:
        pytest.skip("the tests do not run as root")
    box = sandbox.find()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert sandbox.preflight(box) == [f"a program could {sandbox._FINDINGS['fork']}"]


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo bubblewrap 0.4.1", "is version 0.4.1"),
        ("echo hello", "does not tell its version"),
        (
            '[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit\n'
            "echo 'bwrap: setting up uid map: Permission denied' >&2; exit 1",
            "bwrap: setting up uid map: Permission denied",
        ),
        ('[ "$1" = --version ] && echo bubblewrap 0.8.0 && exit', "did not start: no word"),
    ],
    ids=["too old", "something else", "no user namespaces", "ends at once"],
)
def test_a_bubblewrap_that_cannot_work_is_refused_in_its_own_words(
    script: str, cause: str, fake: Callable[[str], Path]
) -> None:
    fake(script)
    with pytest.raises(MissingError) as caught:
        sandbox.find()
    assert cause in caught.value.cause
    assert "\n" not in caught.value.cause


def test_a_sandbox_that_does_not_start_fails_no_program(fake: Callable[[str], Path]) -> None:
    """A machine out of processes must not become a score of 0."""
    path = fake("echo 'bwrap: Resource temporarily unavailable' >&2; exit 1")
    box = Sandbox("broken", (str(path),), confined=True)
    with pytest.raises(RunError, match="did not start: bwrap: Resource temporarily unavailable"):
        box.run("1")
    with pytest.raises(RunError):
        box.run_all(["1"] * 8, workers=2)
    path.unlink()
    with pytest.raises(RunError, match="did not start"):
        box.run("1")


def test_a_sandbox_that_hangs_before_the_program_is_given_up(
    fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "STARTUP_S", 0.5)
    path = fake("exec /bin/sleep 60")
    with pytest.raises(RunError, match="did not start"):
        Sandbox("slow", (str(path),), confined=True).run("1" * 2**20)


def test_the_name_tells_versions_that_may_move_a_score(user: User) -> None:
    assert re.fullmatch(r"bwrap \d+\.\d+\.\d+, python 3\.\d+", user.name)


def test_a_sandbox_is_tried_once_per_process(bwrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sandbox.find()
    monkeypatch.setattr(sandbox, "preflight", lambda box: pytest.fail("tried again"))
    assert sandbox.find() is found


def test_a_python_outside_usr_is_shown_without_the_home_it_lies_in(
    bwrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path(sys.base_prefix).resolve().is_relative_to("/usr"):
        pytest.skip("this Python lies in /usr")
    monkeypatch.setattr(sandbox, "_SYSTEM_PYTHON", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root's own Python is for root alone
    python = sandbox._python.__wrapped__()
    prefix = Path(python.path).parents[1]
    box = Sandbox("own", sandbox._bwrap(bwrap, python), confined=True)
    program = f"""
        import ctypes, os, sys
        assert sys.executable == {python.path!r}
        assert sorted(os.listdir({str(prefix)!r})) == ["bin", "lib"]
        assert os.listdir({str(prefix / "bin")!r}) == [{Path(python.path).name!r}]
        assert os.listdir({str(prefix.parent)!r}) == [{prefix.name!r}]
    """
    outcome = box.run(textwrap.dedent(program))
    assert outcome.passed, outcome


def test_without_a_sandbox_the_name_says_so_and_limits_still_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    box = sandbox.find(unsafe=True)
    assert box.name.startswith("no sandbox")
    assert box.run("1").passed
    assert box.run("import os; os._exit(0)").why == "failed"
    assert box.run("while True: pass", timeout_s=0.5).why == "timeout"
    assert box.run("bytearray(10 * 2**30)").detail == "MemoryError"
    assert box.run("while True: print('x' * 2**16)").why == "output"
    assert box.run(f"import os; assert '{SECRET}' not in os.environ.values()").passed
    assert box.run("import os; os.abort()").why == "killed"


# HumanEval itself. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [False, True], ids=["as printed", "with a raise"])
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.soak)])
def test_humanevals_own_solutions_pass_and_broken_ones_do_not(
    every: int, broken: bool, bwrap: str, shared_data: Path
) -> None:
    file = shared_data / "benchmarks" / "humaneval" / "HumanEval.jsonl"
    if not file.exists():
        pytest.skip("HumanEval is not among the benchmark files")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][::every]
    programs = [
        f"{row['prompt']}{'    raise ValueError' if broken else ''}\n{row['canonical_solution']}\n"
        f"{row['test']}\ncheck({row['entry_point']})\n"
        for row in rows
    ]
    outcomes = sandbox.find().run_all(programs, workers=2)
    assert [outcome.detail for outcome in outcomes if outcome.passed == broken] == []
    if broken:
        assert {outcome.detail for outcome in outcomes} == {"ValueError"}
