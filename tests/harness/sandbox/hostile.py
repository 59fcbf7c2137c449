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
    "import os, struct\nm = b't4:b16:' + b'0' * 16 + b'T0:i1:2N0:'\n"
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
    "thread": attack("import threading\nthreading.Thread(target=print).start()", detail="can't start new thread"),
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
        "m = b't4:b16:' + b'0' * 16 + b'T0:i1:2N0:'\nos.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)",
        "broken",
    ),
    "announced giant": in_call("os.write(4, b'\\xff' * 8)\ntime.sleep(9)", "broken"),
    "deep bytes": in_call("m = b'l1:' * 10**6\nos.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)", "broken"),
    "key without a hash": in_call(
        "m = b't4:b0:T0:d2:l0:N0:N0:'\nos.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)", "broken"
    ),
    "unknown class by name": in_call(
        "m = b't4:b0:T0:x2:u9:os.systemt1:u2:idN0:'\nos.write(4, len(m).to_bytes(8, 'big') + m)\ntime.sleep(9)",
        "broken",
    ),
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
        "import sys\nc = sys.modules['sandbox._values'].Codec\nc.encode = lambda self, v: b'T0:'\ndef f(x): return 0",
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
    "list in itself": in_call("a = []\na.append(a)\nreturn a", "failed", "RecursionError"),
    "dict in itself": in_call("a = {}\na[1] = a\nreturn a", "failed", "RecursionError"),
    "deep list": in_call("a = []\nfor _ in range(10**5): a = [a]\nreturn a", "failed", "RecursionError"),
    "list of lists of lists": in_call("a = [0]\nfor _ in range(40): a = [a, a]\nreturn a", "timeout memory"),
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
