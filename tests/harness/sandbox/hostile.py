"""Programs that mean harm. Each answers rightly once its attack has worked, so that only containment fails it.

`@SECRET@`, `@FOLDER@`, `@PORT@` and `@PID@` stand for a file that no program may read or change, a folder where it may
leave nothing, a port where a server listens, and the process that judges.
"""

from typing import NamedTuple

ANSWER = "\ndef f(x):\n    return x + 1\n"
TESTS = "assert f(1) == 2\nassert f(41) == 42\n"


class Hostile(NamedTuple):
    code: str
    reasons: str
    """Reasons that may be given, with spaces between."""
    detail: str = ""
    """Regular expression that the detail must match."""


def attack(code: str, reasons: str = "failed", detail: str = "PermissionError|not permitted|denied") -> Hostile:
    """Code that acts when the module is loaded; if nothing stops it, the program passes."""
    return Hostile(code + ANSWER, reasons, detail)


def in_call(body: str, reasons: str, detail: str = "") -> Hostile:
    """Code that acts when the function is called."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Hostile(f"import os, sys, time\ndef f(x):\n{lines}    return x + 1\n", reasons, detail)


SWALLOW = "import os, sys\nwhile True:\n    try:\n        {}\n    except BaseException:\n        pass\n"
FORGED = (
    "import os, struct\nm = b't5:b16:' + b'0' * 16 + b't0:t0:t2:u5:valuei1:2t0:'\n"
    "for fd in range(3, 64):\n    try: os.write(fd, struct.pack('>Q', len(m)) + m)\n    except OSError: pass\n"
)
FAKE = """
class Fake({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
def f(x): return Fake({value})
"""
SEARCH = """
import gc, sys, os
found = []
def look(value, depth=0):
    if isinstance(value, (str, bytes)):
        text = value if isinstance(value, str) else value.decode('latin-1')
        at = text.find('f(1) ' + '== ')
        if at >= 0 and text[at + 8:at + 9].isdigit():
            found.append(int(text[at + 8:].split()[0]))
    elif isinstance(value, (dict, list, tuple, set)) and depth < 4:
        for item in list(value.items() if isinstance(value, dict) else value):
            look(item, depth + 1)
{how}
def f(x):
    return found[0] if found else None
"""

HOSTILE: dict[str, Hostile] = {
    # Processes and threads
    "fork bomb": attack("import os\nwhile True: os.fork()"),
    "fork bomb that swallows errors": attack(SWALLOW.format("os.fork()"), "timeout", ""),
    "fork behind the module": attack("import _posixsubprocess, os\nprint(os.forkpty())"),
    "multiprocessing": attack("import multiprocessing as m\np = m.Process(target=print)\np.start()"),
    "sleeping threads": attack(
        "import threading, time\nthreading.stack_size(1 << 15)\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "memory failed",
        "runs [0-9]+ threads|can't start new thread",
    ),
    "thread bomb that swallows errors": attack(
        SWALLOW.format("import threading; threading.Thread(target=print).start()"), "timeout", ""
    ),
    "daemonised grandchild": attack(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(60)\n    os._exit(0)"
    ),
    "shell": attack("import os\nassert os.system('touch @FOLDER@/shell') == 0"),
    "subprocess": attack("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'touch @FOLDER@/subprocess'])"),
    "exec": attack("import os\nos.execv('/bin/sh', ['sh', '-c', 'touch @FOLDER@/exec'])"),
    "posix_spawn": attack("import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'touch @FOLDER@/spawn'], {})"),
    "ctypes system": attack("import ctypes\nctypes.CDLL(None).system(b'touch @FOLDER@/ctypes')"),
    # No hook of Python sees these two: they stand for all that the kernel alone refuses.
    "session": attack("import os\nos.setsid()"),
    "file in memory": attack("import os\nos.memfd_create('x')"),
    # Signals
    "kill the judge": attack("import os\nos.kill(@PID@, 9)"),
    "kill the parent": attack("import os\nos.kill(os.getppid(), 9)"),
    "kill everything": attack("import os\nos.kill(-1, 9)"),
    "kill the group": attack("import os\nos.killpg(0, 9)"),
    "kill through pidfd": attack("import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(@PID@), 9)"),
    "own a descriptor for another": attack("import fcntl\nfcntl.fcntl(1, fcntl.F_SETOWN, @PID@)"),
    "limit the judge": attack("import resource\nresource.prlimit(@PID@, resource.RLIMIT_CPU, (0, 0))"),
    "ignore every signal": attack(
        "import signal\nfor s in signal.valid_signals():\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
        "",
    ),
    # Time
    "endless loop that catches all": attack(SWALLOW.format("sys.exit()"), "timeout", ""),
    "endless sleep": attack("import time\ntime.sleep(10**6)", "timeout", ""),
    "endless arithmetic": attack("9**9**9", "timeout memory", ""),
    "endless regular expression": attack("import re\nre.match('(a+)+b', 'a' * 64)", "timeout", ""),
    "hang in the call": in_call("while True: time.sleep(1)", "timeout"),
    "hang in the exit": Hostile(
        "import atexit, sys\natexit.register(lambda: [None for _ in iter(int, 1)])\ndef f(x): sys.exit(0)", "exited"
    ),
    # Memory
    "huge allocation": attack("x = bytearray(10**12)", "memory", ""),
    "slow allocation": attack("x = []\nwhile True: x.append(bytearray(10**6))", "memory", ""),
    "allocation that swallows errors": attack(SWALLOW.format("x = bytearray(10**9)"), "timeout", ""),
    "endless recursion": in_call("return f(x)", "failed", "RecursionError"),
    "recursion without a limit": in_call("sys.setrecursionlimit(10**9)\nreturn f(x) + f(x)", "crashed memory timeout"),
    "segmentation fault": in_call("import faulthandler\nfaulthandler._read_null()", "crashed", "SIGSEGV"),
    "abort": in_call("os.abort()", "crashed", "SIG"),
    # Output
    "endless stdout": attack("while True: print('x' * 1000)", "output", ""),
    "endless stderr": attack("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output", ""),
    "endless raw write": attack("import os\nwhile True: os.write(1, b'passed' * 1000)", "output", ""),
    # Secrets
    "environment": attack("import os\nos.environ['SEMALIGN_SECRET']", detail="KeyError"),
    "environment of the judge": attack("open('/proc/@PID@/environ').read()"),
    "own environment": attack("open('/proc/self/environ').read()"),
    "memory of the judge": attack("open('/proc/@PID@/mem', 'rb').read()"),
    "first process": attack("open('/proc/1/status').read()"),
    "passwords": attack("open('/etc/passwd').read()"),
    "secret": attack("open('@SECRET@').read()"),
    "secret through a descriptor": attack("import os\nos.read(os.open('@SECRET@', os.O_RDONLY), 100)"),
    "secret through a relative path": attack("open('../../../..@SECRET@').read()"),
    "secret through a link": attack("import os\nos.symlink('@SECRET@', '@FOLDER@/link')\nopen('@FOLDER@/link').read()"),
    "secret through a mapping": attack("import mmap, os\nmmap.mmap(os.open('@SECRET@', 0), 0, prot=1)"),
    "secret through a line cache": attack(
        "import linecache\nassert linecache.getlines('@SECRET@')", detail="Assertion"
    ),
    "list the home": attack(
        "import os\nassert os.listdir(os.path.dirname('@SECRET@'))", detail="PermissionError|FileNotFoundError"
    ),
    "installed packages": attack(
        "import os, sys\nfolder = next(p for p in sys.path if os.path.isdir(p + '/encodings'))\n"
        "path = folder + '/site-packages/README.txt'\nopen(path).read()"
    ),
    "installed packages behind a rebound hook": attack(
        "import os, sys\nsys.modules['sandbox._confine'].isinstance = lambda *a: True\n"
        "sys.modules['sandbox._confine'].DENIED = ('zz',)\n"
        "folder = next(p for p in sys.path if os.path.isdir(p + '/encodings'))\n"
        "open(folder + '/site-packages/README.txt').read()"
    ),
    # Files
    "write to the folder": attack("open('@FOLDER@/file', 'w')"),
    "write to the temporary folder": attack("open('/tmp/semalign-hostile', 'w')"),
    "write to shared memory": attack("open('/dev/shm/semalign-hostile', 'w')"),
    "write to the working folder": attack("open('semalign-hostile', 'w')"),
    "write through a temporary file": attack("import tempfile\ntempfile.mkstemp()", detail="FileNotFound|Permission"),
    "shared memory": attack(
        "from multiprocessing import shared_memory as s\ns.SharedMemory(create=True, size=9)", detail=""
    ),
    "make a folder": attack("import os\nos.mkdir('@FOLDER@/folder')"),
    "append to the secret": attack("open('@SECRET@', 'a')"),
    "truncate the secret": attack("import os\nos.truncate('@SECRET@', 0)"),
    "delete the secret": attack("import os\nos.remove('@SECRET@')"),
    "rename the secret": attack("import os\nos.rename('@SECRET@', '@SECRET@.old')"),
    "chmod the secret": attack("import os\nos.chmod('@SECRET@', 0o777)"),
    "touch the secret": attack("import os\nos.utime('@SECRET@', (0, 0))"),
    "remove the tree": attack("import shutil\nshutil.rmtree('@FOLDER@')"),
    "write to the database": attack(
        "import sqlite3\nsqlite3.connect('@FOLDER@/db').execute('create table t (x)')", detail=""
    ),
    # Network
    "TCP": attack("import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 1)"),
    "UDP": attack(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))"
    ),
    "HTTP": attack("import urllib.request as u\nu.urlopen('http://127.0.0.1:@PORT@/', timeout=1)"),
    "unix socket": attack("import socket\nsocket.socket(socket.AF_UNIX).connect('@FOLDER@/socket')"),
    "abstract socket": attack("import socket\nsocket.socket(socket.AF_UNIX).bind('\\0semalign')"),
    "socket behind the module": attack("import _socket\n_socket.socket(2, 1, 0).connect(('127.0.0.1', @PORT@))"),
    # The reporting channel
    "close every descriptor": attack("import os\nos.closerange(0, 1000)", "exited", ""),
    "close every descriptor and hang": attack(
        "import os\nos.closerange(0, 1000)\nwhile True: pass", "exited timeout", ""
    ),
    "garbage on every descriptor": attack(
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'passed' * 100)\n    except OSError: pass",
        "broken",
        "",
    ),
    "flood on every descriptor": attack(
        "import os\nwhile True:\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, b'\\0' * 8 + b'x' * 10000)\n        except OSError: pass",
        "broken",
        "",
    ),
    "answers before the questions": Hostile(FORGED + "def f(x): return 0\n", "broken"),
    "answers with another ticket": in_call(
        "m = b't5:b16:' + b'0' * 16 + b't0:t0:t2:u5:valuei1:2t0:'\n"
        "os.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)",
        "broken",
    ),
    "announced giant": in_call("os.write(4, b'\\xff' * 8)\ntime.sleep(9)", "broken"),
    "deep bytes": in_call("m = b'l1:' * 10**6\nos.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)", "broken"),
    "half an answer": in_call("os.write(4, (100).to_bytes(8, 'big') + b'x')\nos._exit(0)", "exited"),
    # Ending early
    "exit at import": attack("import sys\nsys.exit(0)", "exited", ""),
    "hard exit at import": attack("import os\nos._exit(0)", "exited", "status 0"),
    "exit in the call": in_call("sys.exit(0)", "exited", "SystemExit"),
    "hard exit in the call": in_call("os._exit(0)", "exited", "status 0"),
    "exit with the sandbox's own status": attack("import os\nos._exit(1)", "exited", "status 1"),
    "interrupt": in_call("raise KeyboardInterrupt", "exited"),
    "generator exit": in_call("raise GeneratorExit", "exited"),
    "stop of the iteration": in_call("raise StopIteration", "failed"),
    "exit when done": Hostile("import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return None", "failed"),
    "exit in the hook": Hostile(
        "import sys, os\nsys.excepthook = lambda *a: os._exit(0)\ndef f(x): raise ValueError", "failed", "ValueError"
    ),
    "pass marker": Hostile("print('passed')\nimport sys\nsys.stderr.write('OK')\ndef f(x): print('passed')", "failed"),
    "only a marker": Hostile("print('passed')", "failed", "NameError"),
    "bytes that are no text": Hostile("\0" + ANSWER, "failed"),
    "half a character as code": Hostile("x = '\ud800'" + ANSWER, "failed", "Unicode"),
    # Faked equality
    "object equal to all": Hostile(FAKE.format(base="object", value=""), "failed", "Assertion"),
    "int equal to all": Hostile(FAKE.format(base="int", value="7"), "failed", "Assertion"),
    "str equal to all": Hostile(FAKE.format(base="str", value="'7'"), "failed", "Assertion"),
    "list equal to all": Hostile(FAKE.format(base="list", value="[7]"), "failed", "Assertion"),
    "dict equal to all": Hostile(FAKE.format(base="dict", value=""), "failed", "Assertion"),
    "class equal to all": Hostile(
        "class M(type):\n    def __eq__(self, o): return True\n    __hash__ = None\n"
        "class C(metaclass=M): pass\ndef f(x): return C",
        "failed",
    ),
    "callable object": Hostile(
        "class F:\n    def __call__(self, x): return self\n    __eq__ = lambda s, o: 1\nf = F()", "failed"
    ),
    "false class": Hostile(
        "class F:\n    __class__ = int\n    __eq__ = lambda s, o: True\ndef f(x): return F()", "failed"
    ),
    # Patched machinery
    "patched assertion": Hostile(
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\ndef f(x): return 0", "failed"
    ),
    "patched exec": Hostile(
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None\ndef f(x): return 0", "failed"
    ),
    "patched json": Hostile(
        "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x): return 0", "failed"
    ),
    "patched codec": Hostile(
        "import sys\nc = sys.modules['sandbox._values'].Codec\nc.write = lambda self, v, out: out.append(b'T0:')\n"
        "def f(x): return 0",
        "broken",
    ),
    "patched peer": Hostile(
        "import sys\np = sys.modules['sandbox._peer'].Peer\np.pack = lambda self, v: b'T0:'\ndef f(x): return 0",
        "broken",
    ),
    "patched player": Hostile(
        "import sys\np = sys.modules['sandbox._referee']\np._run = lambda *a: (True, 'passed', '')\n"
        "p.referee = None\ndef f(x): return 0",
        "failed",
    ),
    "patched exit": Hostile("import os, sys\nos._exit = sys.exit = lambda *a: None\ndef f(x): return 0", "failed"),
    "patched builtins": Hostile(
        "import builtins\nfor n in ('len', 'all', 'isinstance', 'type', 'abs', 'set', 'sorted'):\n"
        "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0",
        "failed broken exited",
    ),
    "tracing": Hostile(
        "import sys\ndef t(frame, event, arg):\n    for k in list(frame.f_locals): frame.f_locals[k] = True\n"
        "    return t\nsys.settrace(t)\nsys.setprofile(t)\ndef f(x): return 0",
        "failed broken exited crashed",
    ),
    "argument changed": Hostile("def f(x):\n    x = 2\n    return 3", "failed"),
    # Stolen tests
    "tests through frames": Hostile(
        SEARCH.format(
            how="frame = sys._getframe()\nwhile frame:\n    look(dict(frame.f_locals))\n    look(frame.f_globals)\n"
            "    look(frame.f_code.co_consts)\n    frame = frame.f_back"
        ),
        "failed",
        "Assertion",
    ),
    "tests through the collector": Hostile(SEARCH.format(how="for o in gc.get_objects(): look(o, 3)"), "failed"),
    "tests through modules": Hostile(
        SEARCH.format(how="for m in list(sys.modules.values()): look(vars(m))\nlook(sys.argv)\nlook(sys.orig_argv)"),
        "failed",
        "Assertion",
    ),
    "tests through descriptors": Hostile(
        SEARCH.format(
            how="for fd in [0, 1, 2, *range(5, 300)]:\n    try: look(os.read(fd, 10**6))\n    except OSError: pass"
        ),
        "failed",
        "Assertion",
    ),
    "tests through memory": Hostile(SEARCH.format(how="look(open('/proc/self/mem', 'rb').read(10**6))"), "failed"),
    "tests through the command line": Hostile(SEARCH.format(how="look(open('/proc/self/cmdline').read())"), "failed"),
    # Monstrous values
    "giant text": in_call("return 'x' * 10**8", "broken memory"),
    "giant number": in_call("return 1 << 10**7", "failed"),
    "list in itself": in_call("a = []\na.append(a)\nreturn a", "failed", "Assertion"),
    "dict in itself": in_call("a = {}\na[1] = a\nreturn a", "failed", "Assertion"),
    "deep list": in_call("a = []\nfor _ in range(10**4): a = [a]\nreturn a", "failed", "Assertion"),
    "deep tuple": in_call("a = ()\nfor _ in range(10**5): a = (a,)\nreturn a", "failed", "RecursionError"),
    "list of lists of lists": in_call("a = [0]\nfor _ in range(40): a = [a, a]\nreturn a", "failed", "Assertion"),
    "tuple of tuples of tuples": in_call("a = (0,)\nfor _ in range(40): a = (a, a)\nreturn a", "timeout memory"),
    "no memory, as the interpreter may say it": in_call(
        "raise SystemError('error return without exception set')", "memory"
    ),
    "endless generator": in_call("return iter(int, 1)", "failed"),
    "not a number": in_call("return float('nan')", "failed"),
    "half a character": in_call("return '\\ud800'", "failed"),
    "error with a giant message": in_call("raise ValueError('x' * 10**7)", "failed", "ValueError"),
    "error whose message hangs": in_call(
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E", "timeout"
    ),
    "error on several lines": in_call("raise ValueError('a\\nb\\x1b[2J\\ud800')", "failed", "a b"),
}

PEER = """
import gc, sys
peer = next(o for o in gc.get_objects() if type(o).__name__ == 'Player')
def ask(operation, number, *arguments):
    class Number: pass
    target = Number()
    peer.numbers[id(target)] = number
    peer.kept = target
    return peer.ask(operation, target, *arguments)
"""


RAW = """
class T(tuple):
    def __getitem__(self, i): return 'public'
class D(dict):
    def __getitem__(self, key): return 1
def raw(operation, target, arguments, keywords={}):
    peer.send(("ask", operation, target, arguments, keywords))
    while True:
        message = peer.receive()
        if message[0] == "value": return message[1]
        if message[0] == "raise": raise message[1]
        peer.answer(message)
"""
"""Asks with parts of other types than the peer's own."""
UNIT = """
import unittest
class A(unittest.TestCase):
    def test(self):
        self.assertEqual(f(1), 2)
result = unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(A))
assert result.wasSuccessful()
"""


class Misled(NamedTuple):
    """A program that would pass if its objects, or what the tests pass to it, had a say in the verdict."""

    code: str
    tests: str
    reasons: str = "failed"
    detail: str = ""


EQUAL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __hash__(self): return 0
    def __sub__(self, other): return 0.0
    __rsub__ = __add__ = __radd__ = __mod__ = __and__ = __xor__ = __sub__
    def __abs__(self): return 0.0
    def __exit__(self, *error): return True
    def __enter__(self): return self
def f(*x): return Equal()
"""
SWALLOW_ALL = """
def f(g):
    try:
        g({value})
    except BaseException:
        pass
    return {value}
"""

ANSWERED = (
    PEER
    + """
import os
def f(x):
    m = b't5:b16:' + peer.ticket + {message!r}
    os.write(4, len(m).to_bytes(8, 'big') + m)
    while True: pass
"""
)

MISLED: dict[str, Misled] = {
    **{
        name: Misled(ANSWERED.format(message=message), TESTS, "broken", detail)
        for name, message, detail in (
            ("key without a hash", b"t0:t0:t2:u5:valued2:l0:N0:t0:", "TypeError"),
            ("unknown class by name", b"t0:t0:t2:u5:valuex2:u9:os.systemt1:u2:idt0:", "KeyError"),
            ("function by name", b"t0:t0:t2:u5:valuen9:os:systemt0:", "no exception"),
            ("object without a number", b"t0:t0:t2:u5:valuer2:99t0:", "KeyError"),
            (
                "number of the tests",
                b"t1:t4:u9:containeri1:2u13:builtins.listt0:t0:t2:u5:valuer1:2t0:",
                "no new number",
            ),
            ("number twice", b"t1:t4:u9:containeri1:1u13:builtins.listt0:t0:t2:u5:valuer1:1t0:", "no new number"),
            ("content of the tests' names", b"t0:t1:t2:i1:0t0:t2:u5:valueN0:t0:", "KeyError"),
            ("class with a standard name", b"t1:t7:u5:classi3:999u1:Au8:Fractionu9:fractionst0:t0:t0:N0:t0:", "false"),
            ("base that is no class", b"t1:t7:u5:classi3:999u1:Au1:Au1:mt1:u9:os:systemt0:t0:N0:t0:", "no exception"),
            ("exit as an answer", b"t0:t0:t2:u5:raisei1:1t0:", "neither asks nor answers"),
            ("empty answer", b"t0:t0:t0:t0:", "neither asks nor answers"),
            ("drops what it does not have", b"t0:t0:t2:u5:valuei1:2t1:i3:999", "KeyError"),
            ("asks for nothing", b"t0:t0:t5:u3:asku4:loadN0:t0:d0:t0:", "not the tests'"),
        )
    },
    "difference that is always nothing": Misled(EQUAL.format(base=""), "assert abs(f(1) - 5.0) < 1e-6"),
    "difference on the left": Misled(EQUAL.format(base=""), "assert abs(5.0 - f(1)) < 1e-6"),
    "float with a false difference": Misled(EQUAL.format(base="(float)"), "assert abs(f(1) - 5.0) < 1e-6"),
    "float with a false order": Misled(EQUAL.format(base="(float)"), "assert 4.9 < f(1) < 5.1"),
    "order that is always right": Misled(EQUAL.format(base=""), "assert 4.9 < f(1) < 5.1"),
    "contains everything": Misled(EQUAL.format(base=""), "assert 5 in f(1)"),
    "list that contains everything": Misled(EQUAL.format(base="(list)"), "assert 5 in f(1)"),
    "equal in a list": Misled(EQUAL.format(base=""), "assert [f(1)] == [5] or f(1) in [5] or {5: 1}.get(f(1))"),
    "equal to a callable": Misled(EQUAL.format(base=""), "assert f(1) == len"),
    "equal to an object of the tests": Misled(EQUAL.format(base=""), "class A: pass\nassert f(1) == A()"),
    "equal as a dict": Misled(EQUAL.format(base="(dict)"), "assert f(1) == {1: 2}"),
    "equal as a tuple": Misled(EQUAL.format(base="(tuple)"), "assert f(1) == (1, 2)"),
    "context that swallows an assertion": Misled(EQUAL.format(base=""), "with f(1) as x:\n    assert x == 5"),
    "assertion of a callback swallowed": Misled(
        SWALLOW_ALL.format(value=3), "def check(x):\n    assert x == 5\nf(check)", detail="assert x == 5"
    ),
    "error of an assertion of a callback swallowed": Misled(
        SWALLOW_ALL.format(value="object()"), "def check(x):\n    assert abs(x - 5) < 1\nf(check)", detail="TypeError"
    ),
    "assertion with a message that raises": Misled(
        "class A:\n    def __str__(self): raise ValueError\n" + SWALLOW_ALL.format(value="A()"),
        "def check(x):\n    assert x == 5, x\nf(check)",
        detail="AssertionError at",
    ),
    "names that the tests bind": Misled(
        PEER + "def f(x):\n    pack = peer.pack\n"
        "    def more(payload):\n        peer.exports.update(expected=1, check=print, len=print)\n"
        "        return pack(payload)\n"
        "    peer.pack = more\n    return 1",
        "expected = 5\ndef check(x): return x == 5\nassert f(1) == expected or check(f(1)) or len([1]) == 2",
    ),
    "assertion of a callback of a callback": Misled(
        "def f(g):\n    try: g(lambda: 3)\n    except BaseException: pass\n",
        "def check(h):\n    assert h() == 5\nf(check)",
        detail="assert h",
    ),
    "globals of a callback": Misled(
        "def f(g): return g.__globals__['expected']", "expected = 7\nassert f(lambda: 1) == expected", detail="KeyError"
    ),
    "code of a callback": Misled(
        "def f(g): return g.__code__.co_consts[-1]", "def secret():\n    return 7\nassert f(secret) == 7"
    ),
    "closure of a callback": Misled(
        "def f(g): return g.__closure__[0].cell_contents",
        "def make(secret):\n    return lambda: secret and None\nassert f(make(7)) == 7",
    ),
    "frame of a generator": Misled(
        "def f(g): return g.gi_frame.f_globals['expected']",
        "expected = 7\nassert f(i for i in [1]) == expected",
        detail="does not leave",
    ),
    "method of an object replaced": Misled(
        "def f(a): a.right = lambda x: True",
        "class A:\n    def right(self, x): return x == 5\na = A()\nf(a)\nassert a.right(3)",
        detail="cannot change",
    ),
    "class of the tests replaced": Misled(
        "def f(A): A.right = lambda *x: True",
        "class A:\n    def right(self, x): return x == 5\nf(A)\nassert A().right(3)",
        detail="cannot change",
    ),
    "operator of a class replaced": Misled(
        "def f(A): A.__eq__ = lambda *x: True",
        "class A: pass\nf(A)\nassert A() == A()",
        detail="AttributeError",
    ),
    "builtins through a callback": Misled(
        "def f(g): return g.__self__.open('/etc/passwd')", "assert f([].append)", detail="AttributeError|attribute"
    ),
    "subclasses of object": Misled(
        "def f(a): return a.__class__.__base__.__subclasses__()[0].x", "assert f(lambda: 1)"
    ),
    "exit for the tests": Misled("def f(x): raise SystemExit(0)", "f(1)", "exited"),
    "end of a loop for the tests": Misled(
        "def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x + 1, [1, 2]))", detail="RuntimeError"
    ),
    "end of an iteration for the tests": Misled("def f(x): return iter(())", "assert list(f(1)) == [1]"),
    "names that the tests do not take": Misled(
        "import builtins\nlen = sorted = round = print = all = abs = AssertionError = lambda *x: True\n"
        "for n in ('len', 'sorted', 'all', 'abs'): setattr(builtins, n, len)\ndef f(x): return 0.5",
        "assert len([f(1)]) == 1\nassert sorted([2, 1]) == [1, 2]\nassert abs(f(1) - 5) < 1 and round(f(1)) == 5",
        "failed exited broken",
    ),
    "modules as classes": Misled(
        "class sys:\n    def getsizeof(x): return 5\nclass math:\n    def isclose(*x): return True\n"
        "def f(x): return sys.getsizeof(x)",
        "assert f([1]) == sys.getsizeof([1])\nassert math.isclose(f(1), 7.5)",
    ),
    "isclose": Misled("def isclose(*x): return True\ndef f(x): return 1", "assert isclose(f(1), 5.0)"),
    "Counter": Misled("def Counter(x): return 1\ndef f(x): return 1", "assert f('aa') == Counter('aa')"),
    "datetime": Misled(
        "class datetime:\n    def strptime(*x): return 1\ndef f(x): return 1",
        "assert f('2020') == datetime.strptime('2020', '%Y')",
    ),
    "patched module": Misled(
        "import math, sys\nmath.isclose = lambda *x: True\nsys.getsizeof = lambda x: 1\ndef f(x): return 1",
        "import math\nassert math.isclose(f(1), 5.0) or f(1) == sys.getsizeof([])",
    ),
    "function of the tests": Misled(
        "def check(x): return True\ndef f(x): return 1", "def check(x): return x == 5\nassert check(f(1))"
    ),
    "name bound late": Misled(
        "def f(x):\n    globals().update(check=lambda x: True, sys=f, expected=1)\n    return 1",
        "expected = 5\ndef check(x): return x == 5\nassert f(1) == expected or check(f(1))",
    ),
    "act on the program's own numbers": Misled(
        PEER + "def f(x): return ask('__call__', 1)", "f(1)", "broken failed exited crashed"
    ),
    "act on every number of the tests": Misled(
        PEER + "def f(l):\n    for n in range(0, 40, 2):\n"
        "        for name in ('__globals__', '__dict__', '__class__', '_peer'):\n"
        "            try: return ask('getattr', n, name)\n            except AttributeError: pass\n    return 5",
        "assert f([1]) == 7",
        "broken failed exited",
    ),
    "names the tests' modules": Misled(
        PEER
        + "p = sys.modules['sandbox._peer']\np.Peer.write_other = lambda s, v, k, out: out.append(b'n14:os:system')\n"
        "def f(x): return object()",
        "f(1)('true')",
        "broken",
    ),
    "class with a false name": Misled(
        "class Fraction:\n    numerator, denominator = 1, 2\n    __eq__ = lambda *x: True\n"
        "Fraction.__module__ = 'fractions'\ndef f(x): return Fraction()",
        "from fractions import Fraction\nassert f(1) == Fraction(1, 3)",
    ),
    "list that lies about its content": Misled(
        "class L(list):\n    __iter__ = lambda s: iter([5])\n    __eq__ = lambda *x: True\n    __len__ = lambda s: 1\n"
        "def f(x): return L([7])",
        "assert f(1) == [5]",
    ),
    "globals of a callback by a tuple that changes": Misled(
        PEER + RAW + "def f(g):\n    raw('getattr', g, T(('__globals__',)))['expected'] = 3\n    return 3",
        "expected = 5\ndef check(x): return x\nassert f(check) == expected",
        "broken",
        "no plain values",
    ),
    "method replaced by a tuple that changes": Misled(
        PEER + RAW + "def f(a):\n    raw('setattr', a, T(('right', lambda x: True)))",
        "class A:\n    def right(self, x): return x == 5\na = A()\nf(a)\nassert a.right(3)",
        "broken",
        "no plain values",
    ),
    "keywords that are no dict": Misled(
        PEER + RAW + "def f(g): return raw('__call__', g, (), D())", "assert f(lambda: 5) == 6", "broken", "no plain"
    ),
    "text that does not format as a name": Misled(
        PEER + RAW + "import builtins\n"
        "class N(str):\n    def __format__(self, spec): raise ValueError\n"
        "def mapped(g, *values):\n    found = list(builtins.map(g, *values))\n"
        "    return [N('E'), *found[1:]] if g is str and found[0] == 'E' else found\n"
        "sys.modules['sandbox._peer'].map = mapped\n"
        "class E(Exception): pass\ndef h(): raise E\n"
        "def f(g):\n    try: g(h)\n    except BaseException: pass",
        "def check(h):\n    assert h() == 5\nf(check)",
        "broken",
        "no text",
    ),
    "end of a loop that says it is built in": Misled(
        "class E(StopIteration): pass\nE.__module__, E.__name__, E.__qualname__ = 'builtins', 'f', 'f'\n"
        "def f(x): raise E",
        "assert all(map(lambda x: f(x) == x + 1, [1, 2]))",
        detail="RuntimeError",
    ),
    "exit that says it is built in": Misled(
        "class E(SystemExit): pass\nE.__module__, E.__name__, E.__qualname__ = 'builtins', 'f', 'f'\ndef f(x): raise E",
        "import threading\ndef work():\n    assert f(1) == 2\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()",
        "exited",
    ),
    "exit that a text of the tests holds": Misled(
        "def f(x): raise SystemExit", "# SystemExit\ntry:\n    f(1)\nexcept BaseException:\n    pass", "exited"
    ),
    "end of an asynchronous loop of the tests": Misled(
        "def f(x): raise StopAsyncIteration",
        "import asyncio\nclass It:\n    n = 0\n    def __aiter__(self): return self\n    async def __anext__(self):\n"
        "        self.n += 1\n        if self.n > 2: raise StopAsyncIteration\n"
        "        return f(self.n) == self.n + 1\n"
        "async def main():\n    async for right in It(): assert right\nasyncio.run(main())",
        detail="RuntimeError",
    ),
    **{
        f"unittest's {name}": Misled(f"import unittest.case\ndef f(x): raise unittest.case.{name}('x')", UNIT)
        for name in ("SkipTest", "_ShouldStop")
    },
    "defaults of a function replaced": Misled(
        PEER + RAW + "def f(g):\n    raw('setattr', g, ('__defaults__', (3,)))\n    g(3)",
        "def check(x, expected=5):\n    assert x == expected\nf(check)",
        detail="cannot change",
    ),
    "defaults of a function changed": Misled(
        PEER + RAW + "def f(g):\n    raw('getattr', g, ('__kwdefaults__',))['expected'] = 3\n    g(3)",
        "def check(x, *, expected=5):\n    assert x == expected\nf(check)",
    ),
    "fields of a dataclass removed": Misled(
        PEER + RAW + "def f(a): raw('getattr', a, ('__dataclass_fields__',)).clear()",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\na, b = A(1), A(2)\nf(a)\n"
        "assert dataclasses.asdict(a) == dataclasses.asdict(b)",
    ),
    "object of an error": Misled(
        PEER + RAW + "def f(g):\n    try: g()\n"
        "    except AttributeError as error: return raw('getattr', error, ('obj',)).expected",
        "class A: expected = 5\ndef g(): return A.nothing\nassert f(g) == 5",
        detail="obj",
    ),
    "name that the tests import with all others": Misled(
        "floor = lambda x: 1\ndef f(x): return 1", "from math import *\nassert f(5.5) == floor(5.5)"
    ),
    **{
        f"count of what is missing, {name}": Misled(
            "from collections import Counter\nclass C(Counter):\n    def __missing__(self, key): return 1\n"
            "def f(x): return C()",
            f"from collections import Counter\n{tests}",
        )
        for name, tests in (
            ("on the left", "assert f('ab') == Counter('ab')"),
            ("on the right", "assert Counter('ab') == f('ab')"),
            ("subtracted", "assert not Counter('ab') - f('ab')"),
        )
    },
    "set with a false length": Misled(
        "class S(set):\n    def __len__(self): return 2\ndef f(x): return S(range(100))",
        "assert {3: 1, 4: 1}.keys() == f(1)",
    ),
    "list that hides its items": Misled(
        "class L(list):\n    def __iter__(self): return iter(())\ndef f(x): return L([0] * len(x))",
        "found, wanted = f([1, 2]), [2.0, 3.0]\nassert len(found) == len(wanted)\n"
        "for a, b in zip(found, wanted):\n    assert abs(a - b) < 1e-6",
    ),
    "asynchronous context that swallows an assertion": Misled(
        "class A:\n    async def __aenter__(self): return 3\n    async def __aexit__(self, *a): return True\n"
        "def f(): return A()",
        "import asyncio\nasync def main():\n    async with f() as x:\n        assert x == 5\nasyncio.run(main())",
        detail="AssertionError at assert x == 5",
    ),
    "print says passed": Misled("def f(x): print('passed'); return 1", "assert f(1) == 2"),
}
"""Programs with tests of their own."""
