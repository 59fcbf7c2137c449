"""Unusual programs that are right: each passes its tests in plain Python, and must pass in the sandbox.

After a line with `# ` and its name stand the program, a line `---` and the tests.
"""

from semalign_harness.sandbox import Program

TEXT = r'''
# keyword argument changed
def f(*, l): l.append(9)
---
l = [1]
f(l=l)
assert l == [1, 9]
# changed before an exception
def f(l):
    l.append(1)
    raise ValueError('late')
---
l = []
try:
    f(l)
except ValueError:
    pass
assert l == [1]
# changed by a generator later
def f(l):
    while True:
        l.append(len(l))
        yield l[-1]
---
l = []
g = f(l)
assert l == []
assert next(g) == 0 and l == [0]
assert next(g) == 1 and l == [0, 1]
# alias in two arguments
def f(a, b):
    a.append(1)
    return b
---
x = []
assert f(x, x) == [1] and x == [1]
# alias inside a container
def f(rows): rows[0].append(1)
---
row = []
rows = [row] * 3
f(rows)
assert rows == [[1], [1], [1]] and row == [1]
# inner container when the outer grows
def f(l):
    l[0].append(5)
    l.insert(0, 7)
---
inner = [1]
l = [inner]
f(l)
assert l == [7, [1, 5]] and l[1] is inner and inner == [1, 5]
# inner container of a dict
def f(d):
    d['a'].append(1)
    d['b'] = 2
---
inner = []
d = {'a': inner}
f(d)
assert inner == [1] and d == {'a': [1], 'b': 2} and d['a'] is inner
# returns its argument
def f(l):
    l.sort()
    return l
---
l = [2, 1]
assert f(l) is l and l == [1, 2]
# returns an inner container
def f(d): return d.setdefault('x', [])
---
d = {}
r = f(d)
r.append(3)
assert d == {'x': [3]} and f(d) is r
# a result that the program changes later
items = []
def add(x):
    items.append(x)
    return items
---
a = add(1)
b = add(2)
assert a is b and a == [1, 2]
# mutable default
def f(x, seen=[]):
    seen.append(x)
    return seen
---
assert f(1) == [1]
assert f(2) == [1, 2]
# keeps an argument and changes it in another call
kept = []
def keep(l): kept.append(l)
def change(): kept[0].append('late')
---
l = []
keep(l)
change()
assert l == ['late']
# the tests change what the program keeps
kept = []
def keep(l): kept.append(l)
def total(): return sum(kept[0])
---
l = [1, 2]
keep(l)
assert total() == 3
l.append(10)
assert total() == 13
# set, bytearray, deque and dict in place
def f(s, b, q, d):
    s.discard(1)
    b.extend(b'c')
    q.rotate(1)
    d.clear()
---
from collections import deque
s, b, q, d = {1, 2}, bytearray(b'ab'), deque([1, 2, 3], maxlen=3), {1: 1}
f(s, b, q, d)
assert s == {2} and b == bytearray(b'abc') and q == deque([3, 1, 2]) and d == {} and q.maxlen == 3
# container in itself
def f(l): l.append(l)
---
l = [1]
f(l)
assert l[1] is l and len(l) == 2
# cyclic result
def f():
    a = {'name': 'a'}
    a['self'] = a
    return a
---
r = f()
assert r['self']['self'] is r and r['name'] == 'a'
# deep result
def f(n):
    r = []
    for _ in range(n): r = [r]
    return r
---
r, depth = f(3000), 0
while r:
    r, depth = r[0], depth + 1
assert depth == 3000
# array in place
def f(a): a.append(3)
---
from array import array
a = array('i', [1])
f(a)
assert a == array('i', [1, 3])
# dict of lists, transposed in place
def f(m):
    m[:] = [list(row) for row in zip(*m)]
---
m = [[1, 2], [3, 4]]
f(m)
assert m == [[1, 3], [2, 4]]
# order of a dict changed
def f(d):
    d['a'] = d.pop('a')
---
d = {'a': 1, 'b': 2}
f(d)
assert list(d) == ['b', 'a']
# OrderedDict
from collections import OrderedDict
def f(d):
    d.move_to_end('a')
    return d
---
from collections import OrderedDict
d = OrderedDict(a=1, b=2)
assert list(f(d)) == ['b', 'a'] and f(d) is d
# swap through a tuple of lists
def f(pair):
    a, b = pair
    a[:], b[:] = b[:], a[:]
---
x, y = [1], [2, 3]
f((x, y))
assert x == [2, 3] and y == [1]
# equality of objects
class V:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return isinstance(other, V) and self.x == other.x
    def __hash__(self): return hash(self.x)
---
assert V(1) == V(1) and V(1) != V(2) and not V(1) == 1
assert len({V(1), V(1), V(2)}) == 2 and V(1) in [V(1)] and {V(1): 'a'}[V(1)] == 'a'
# dataclass
from dataclasses import dataclass
@dataclass
class P:
    x: int
    y: int = 0
def f(): return P(1, 2)
---
assert f() == P(1, 2) and f() != P(1) and f().x == 1 and repr(f()) == 'P(x=1, y=2)'
# ordered dataclass
from dataclasses import dataclass
@dataclass(order=True, frozen=True)
class P:
    x: int
def f(xs): return [P(x) for x in xs]
---
assert sorted(f([3, 1, 2])) == f([1, 2, 3]) and max(f([1, 5])) == P(5) and len(set(f([1, 1]))) == 1
try:
    f([1])[0].x = 3
except AttributeError:
    pass
else:
    assert False
# addition
class V:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return V(self.x + o.x, self.y + o.y)
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
---
assert V(1, 2) + V(3, 4) == V(4, 6)
assert (V(1, 2) + V(3, 4)).y == 6
v = V(1, 1)
v += V(1, 0)
assert v.x == 2
# unary operators and conversions
class N:
    def __init__(self, x): self.x = x
    def __int__(self): return int(self.x)
    def __float__(self): return float(self.x)
    def __index__(self): return self.x
    def __neg__(self): return N(-self.x)
    def __abs__(self): return N(abs(self.x))
    def __bool__(self): return self.x != 0
    def __len__(self): return 3
    def __str__(self): return f'N{self.x}'
    def __format__(self, spec): return format(self.x, spec)
    def __round__(self, digits=0): return round(self.x, digits)
---
n = N(2)
assert int(n) == 2 and float(n) == 2.0 and [5, 6, 7][n] == 7 and int(-n) == -2 and int(abs(N(-3))) == 3
assert n and not N(0) and len(n) == 3 and str(n) == 'N2' and f'{n:03d}' == '002' and bin(n) == '0b10'
# context manager
class C:
    def __init__(self): self.log = []
    def __enter__(self):
        self.log.append('in')
        return self
    def __exit__(self, *error):
        self.log.append(error[0] is None)
---
with C() as c:
    assert c.log == ['in']
assert c.log == ['in', True]
# context manager that sees an error
class C:
    def __enter__(self): return self
    def __exit__(self, kind, error, trace): self.kind, self.text = kind.__name__, str(error)
---
c = C()
try:
    with c:
        raise KeyError('k')
except KeyError:
    pass
assert c.kind == 'KeyError' and c.text == "'k'"
# contextmanager
from contextlib import contextmanager
log = []
@contextmanager
def f(x):
    log.append('in')
    yield x * 2
    log.append('out')
---
with f(4) as y:
    assert y == 8 and log == ['in']
assert log == ['in', 'out']
# items of an object
class M:
    def __init__(self): self.d = {}
    def __setitem__(self, k, v): self.d[k] = v
    def __getitem__(self, k): return self.d[k]
    def __delitem__(self, k): del self.d[k]
    def __contains__(self, k): return k in self.d
    def __iter__(self): return iter(self.d)
    def __len__(self): return len(self.d)
---
m = M()
m['a'], m[2] = 1, [2]
assert m['a'] == 1 and m[2] == [2] and len(m) == 2 and 'a' in m and 'z' not in m and list(m) == ['a', 2]
del m['a']
assert len(m) == 1
m[2].append(3)
assert m[2] == [2, 3]
try:
    m['nothing']
except KeyError as error:
    assert error.args == ('nothing',)
else:
    assert False
# isinstance and issubclass
class A: pass
class B(A): pass
def f(): return B()
---
assert isinstance(f(), A) and isinstance(f(), (int, B)) and not isinstance(A(), B) and issubclass(B, A)
assert type(f()) is B and type(f()).__name__ == 'B' and f().__class__ is B and not isinstance(3, A)
# abstract classes
from abc import ABC, abstractmethod
class Shape(ABC):
    @abstractmethod
    def area(self): ...
class Square(Shape):
    def __init__(self, a): self.a = a
    def area(self): return self.a ** 2
---
assert Square(3).area() == 9 and isinstance(Square(1), Shape)
try:
    Shape()
except TypeError:
    pass
else:
    assert False
# own exception
class My(Exception): pass
def f(x): raise My('bad', x)
---
try:
    f(3)
except My as error:
    assert error.args == ('bad', 3) and isinstance(error, My) and type(error) is My
else:
    assert False
# hierarchy of exceptions with attributes
class Base(ValueError):
    def __init__(self, code, message):
        super().__init__(message)
        self.code = code
class Sub(Base):
    def __str__(self): return f'<{self.code}>'
def f(): raise Sub(7, 'seven')
---
try:
    f()
except Base as error:
    assert error.code == 7 and str(error) == '<7>' and error.args == ('seven',)
try:
    f()
except ValueError as error:
    assert isinstance(error, Sub)
try:
    f()
except (KeyError, TypeError):
    assert False
except Exception as error:
    assert type(error).__name__ == 'Sub'
# cause of an exception
def f(s):
    try:
        return int(s)
    except ValueError as error:
        raise RuntimeError('no number') from error
---
try:
    f('x')
except RuntimeError as error:
    assert isinstance(error.__cause__, ValueError) and 'invalid literal' in str(error.__cause__)
else:
    assert False
# exceptions of the standard library
import json
def f(s): return json.loads(s)
---
import json
assert f('[1]') == [1]
try:
    f('{')
except json.JSONDecodeError as error:
    assert 'Expecting' in str(error)
else:
    assert False
# details of built-in exceptions
def f(k): return {}[k]
def g(): raise OSError(2, 'gone')
def h(): raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'why')
---
for call, kind in ((lambda: f('k'), KeyError), (g, FileNotFoundError), (h, UnicodeError)):
    try:
        call()
    except kind as error:
        pass
    else:
        assert False
try:
    g()
except OSError as error:
    assert error.errno == 2 and error.strerror == 'gone'
# exception as a value
def f(x): return ValueError('v', x)
---
e = f(1)
assert isinstance(e, ValueError) and e.args == ('v', 1)
try:
    raise e
except ValueError as error:
    assert error is e
# exception group
def f(): raise ExceptionGroup('many', [ValueError(1), KeyError(2)])
---
try:
    f()
except* ValueError as group:
    assert group.exceptions[0].args == (1,)
except* KeyError as group:
    assert group.exceptions[0].args == (2,)
# exit that the tests expect
import sys
def main(args):
    if not args: sys.exit(2)
    return 0
---
assert main(['x']) == 0
try:
    main([])
except SystemExit as error:
    assert error.code == 2
else:
    assert False
# name and docstring of a function
def f(x: int, y=2, *, z=3) -> str:
    """Say."""
    return f'{x}{y}{z}'
---
assert f.__name__ == 'f' and f.__doc__ == 'Say.' and f.__defaults__ == (2,) and f.__qualname__ == 'f'
assert f.__annotations__ == {'x': int, 'return': str} and f.__code__.co_argcount == 2 and callable(f)
# signature
def f(a, b=1, *args, c, **kw): pass
---
import inspect
assert list(inspect.signature(f).parameters) == ['a', 'b', 'args', 'c', 'kw']
# namedtuple
from collections import namedtuple
Point = namedtuple('Point', 'x y')
def f(): return Point(1, 2)
---
p = f()
assert p.x == 1 and p.y == 2 and p == (1, 2) and p._fields == ('x', 'y') and p._asdict() == {'x': 1, 'y': 2}
assert p._replace(x=5) == Point(5, 2) and isinstance(p, tuple) and isinstance(p, Point) and repr(p) == 'Point(x=1, y=2)'
a, b = p
assert a + b == 3
# typed namedtuple with a method
from typing import NamedTuple
class Point(NamedTuple):
    x: int
    count: int = 0
    def norm(self): return abs(self.x) + self.count
---
assert Point(-3).norm() == 3 and Point(1, 2).count == 2 and Point(1, 2) == (1, 2) and Point(1, 2).index(2) == 1
# enumeration
from enum import Enum
class Colour(Enum):
    RED = 1
    BLUE = 'b'
def f(x): return Colour(x)
---
assert f(1) is Colour.RED and f(1) == Colour.RED and f('b').name == 'BLUE' and f(1).value == 1
assert [c.name for c in Colour] == ['RED', 'BLUE'] and len(Colour) == 2 and Colour['RED'] is Colour.RED
assert {Colour.RED: 1}[f(1)] == 1 and f(1) in Colour and f(1) != Colour.BLUE
# integer enumeration
from enum import IntEnum
class Level(IntEnum):
    LOW = 1
    HIGH = 2
---
assert Level.LOW < Level.HIGH and Level.LOW == 1 and Level.HIGH.name == 'HIGH' and Level(2) is Level.HIGH
assert sorted([Level.HIGH, Level.LOW]) == [1, 2] and isinstance(Level.LOW, int) and max(Level) == 2
# flags
from enum import Flag, auto
class Right(Flag):
    READ = auto()
    WRITE = auto()
def f(): return Right.READ | Right.WRITE
---
assert f() & Right.READ == Right.READ and Right.READ in f() and f() == Right.READ | Right.WRITE
# subclass of int
class Even(int):
    def half(self): return self // 2
def f(x): return Even(x)
---
assert f(4) == 4 and f(4).half() == 2 and isinstance(f(4), Even) and f(4) + 1 == 5
# subclass of list
class Stack(list):
    def push(self, x): self.append(x)
    def peek(self): return self[-1]
---
s = Stack()
s.push(1)
s.push(2)
assert s == [1, 2] and s.peek() == 2 and len(s) == 2 and isinstance(s, list) and s.pop() == 2 and s.peek() == 1
# subclass of dict with its own methods
class D(dict):
    def __missing__(self, key): return key * 2
    def __setitem__(self, key, value): super().__setitem__(key, value + 1)
---
d = D()
d['a'] = 1
assert d['a'] == 2 and d['b'] == 'bb' and d == {'a': 2}
# subclass of str
class Name(str):
    def shout(self): return self.upper() + '!'
---
assert Name('a').shout() == 'A!' and Name('a') == 'a' and isinstance(Name('a'), str)
# attributes of an object
class A:
    kind = 'a'
    def __init__(self): self.l = []
    @property
    def n(self): return len(self.l)
---
a = A()
a.l.append(1)
a.extra = 5
assert a.n == 1 and a.extra == 5 and hasattr(a, 'l') and not hasattr(a, 'm') and getattr(a, 'm', 0) == 0
assert A.kind == 'a' and vars(a) == {'l': [1], 'extra': 5}
del a.extra
assert not hasattr(a, 'extra')
A.kind = 'b'
assert a.kind == 'b'
# static and class methods
class A:
    made = 0
    @classmethod
    def make(cls):
        cls.made += 1
        return cls()
    @staticmethod
    def twice(x): return 2 * x
---
assert isinstance(A.make(), A) and A.made == 1 and A.twice(2) == 4 and A().twice(3) == 6
# iterator class
class Count:
    def __init__(self, n): self.n = n
    def __iter__(self): return self
    def __next__(self):
        if not self.n: raise StopIteration
        self.n -= 1
        return self.n
---
assert list(Count(3)) == [2, 1, 0] and sum(Count(4)) == 6 and 1 in Count(3)
c = Count(1)
assert next(c) == 0 and next(c, 'end') == 'end'
# generator methods
def f():
    total = 0
    while True:
        x = yield total
        if x is None: return 'done'
        total += x
---
g = f()
assert next(g) == 0 and g.send(3) == 3 and g.send(4) == 7
try:
    g.send(None)
except StopIteration as end:
    assert end.value == 'done'
# generator types
def f(): yield 1
---
import types, collections.abc, inspect
assert isinstance(f(), types.GeneratorType) and isinstance(f(), collections.abc.Iterator) and inspect.isgenerator(f())
assert not isinstance(f, types.GeneratorType) and isinstance(f, types.FunctionType)
# linked list of the tests' making
class Node:
    def __init__(self, v, n=None): self.v, self.n = v, n
def reverse(h):
    p = None
    while h: h.n, p, h = p, h, h.n
    return p
---
a = Node(1, Node(2, Node(3)))
r = reverse(a)
assert [r.v, r.n.v, r.n.n.v] == [3, 2, 1] and r.n.n is a and r.n.n.n is None
# callable object with state
class Counter2:
    def __init__(self): self.n = 0
    def __call__(self, by=1):
        self.n += by
        return self.n
f = Counter2()
---
assert f() == 1 and f(by=2) == 3 and f.n == 3 and callable(f)
# attribute of a function
def f():
    f.calls += 1
f.calls = 0
---
f()
f()
assert f.calls == 2
f.calls = 0
f()
assert f.calls == 1
# global that the program binds again
total = 0
def add(x):
    global total
    total += x
---
add(2)
add(3)
assert total == 5
# cached function
from functools import lru_cache
@lru_cache(None)
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
---
assert fib(50) == 12586269025 and fib.cache_info().misses == 51
fib.cache_clear()
assert fib.cache_info().currsize == 0
# copies of objects
class A:
    def __init__(self): self.l = [1]
---
import copy
a = A()
b, c = copy.copy(a), copy.deepcopy(a)
a.l.append(2)
assert b.l is a.l and c.l == [1] and isinstance(c, A)
# with and abstract containers
from collections import UserDict
class U(UserDict): pass
---
u = U(a=1)
u['b'] = 2
assert u['b'] == 2 and len(u) == 2 and sorted(u) == ['a', 'b'] and dict(u) == {'a': 1, 'b': 2} and u.get('z') is None
# comparison with total_ordering
from functools import total_ordering
@total_ordering
class V:
    def __init__(self, s): self.t = tuple(map(int, s.split('.')))
    def __eq__(self, o): return self.t == o.t
    def __lt__(self, o): return self.t < o.t
---
assert V('1.10') > V('1.9') and V('1.0') <= V('1.0') and sorted([V('2'), V('1')])[0] == V('1')
# matrix product of objects
class M:
    def __init__(self, rows): self.rows = rows
    def __matmul__(self, o): return M([[sum(a * b for a, b in zip(r, c)) for c in zip(*o.rows)] for r in self.rows])
    def __eq__(self, o): return self.rows == o.rows
---
assert M([[1, 2]]) @ M([[3], [4]]) == M([[11]])
# pattern matching on objects of the program
class P:
    __match_args__ = ('x', 'y')
    def __init__(self, x, y): self.x, self.y = x, y
---
match P(1, 2):
    case P(1, y):
        assert y == 2
    case _:
        assert False
# lambda
def f(g, xs): return [g(x) for x in xs]
---
assert f(lambda x: x * 2, [1, 2]) == [2, 4]
# function of the tests that keeps count
def retry(g, n):
    for _ in range(n):
        try:
            return g()
        except ValueError:
            pass
    raise RuntimeError('all failed')
---
calls = []
def flaky():
    calls.append(1)
    if len(calls) < 3: raise ValueError
    return 'ok'
assert retry(flaky, 5) == 'ok' and len(calls) == 3
# built-in functions
def f(g, *a): return g(*a)
---
import math, operator
assert f(max, [1, 3]) == 3 and f(len, 'ab') == 2 and f(str.upper, 'a') == 'A' and f(math.sqrt, 4) == 2
assert f(operator.add, 1, 2) == 3 and f(sorted, [2, 1]) == [1, 2] and f(operator.itemgetter(1), [1, 2]) == 2
# bound method
def each(xs, g):
    for x in xs: g(x)
---
seen = []
each([1, 2], seen.append)
assert seen == [1, 2]
# decorator
import functools
def twice(g):
    @functools.wraps(g)
    def inner(*a, **k): return 2 * g(*a, **k)
    return inner
---
@twice
def g(x, y=1):
    """Add."""
    return x + y
assert g(1) == 4 and g(1, y=2) == 6 and g.__name__ == 'g' and g.__doc__ == 'Add.'
# decorator with arguments that counts
def count(start):
    def wrap(g):
        def inner(*a):
            inner.calls += 1
            return g(*a)
        inner.calls = start
        return inner
    return wrap
---
@count(10)
def g(x): return x
g(1)
assert g(2) == 2 and g.calls == 12
# memoise
def memo(g):
    cache = {}
    def inner(*a):
        if a not in cache: cache[a] = g(*a)
        return cache[a]
    return inner
---
calls = []
@memo
def slow(x):
    calls.append(x)
    return x * x
assert slow(3) == 9 and slow(3) == 9 and calls == [3]
# curry by the number of parameters
import inspect
def curry(g):
    n = len(inspect.signature(g).parameters)
    def take(*a): return g(*a) if len(a) >= n else lambda *b: take(*a, *b)
    return take
---
assert curry(lambda a, b, c: a + b + c)(1)(2)(3) == 6
# parameters of a function of the tests
def f(g): return g.__name__, g.__code__.co_argcount, g.__doc__
---
def h(a, b=2, *c, d, e=5, **k):
    """H."""
    return a, b, c, d, e, k
assert f(h) == ('h', 2, 'H.')
# call with every kind of argument
def f(g): return g(1, d=4), g(1, 2, 3, d=4, z=9)
---
def h(a, b=2, *c, d, e=5, **k): return a, b, c, d, e, k
assert f(h) == ((1, 2, (), 4, 5, {}), (1, 2, (3,), 4, 5, {'z': 9}))
# compose
def compose(*gs):
    def run(x):
        for g in reversed(gs): x = g(x)
        return x
    return run
---
assert compose(str, lambda x: x + 1, len)('abc') == '4'
# sort key and reduce
from functools import reduce
def f(xs, key): return sorted(xs, key=key)
def g(h, xs): return reduce(h, xs)
---
assert f(['bb', 'a'], len) == ['a', 'bb'] and f([1, -2], lambda x: x) == [-2, 1] 
assert g(lambda a, b: a * b, [2, 3, 4]) == 24
# generator as an argument
def f(xs): return [x * x for x in xs]
def first(xs): return next(xs)
---
assert f(x for x in range(3)) == [0, 1, 4]
g = (x for x in 'abc')
assert first(g) == 'a' and next(g) == 'b' and first(g) == 'c'
# endless generator as an argument
from itertools import islice
def f(xs, n): return list(islice(xs, n))
---
import itertools
def naturals():
    n = 0
    while True:
        yield n
        n += 1
assert f(naturals(), 3) == [0, 1, 2] and f(itertools.count(5), 2) == [5, 6]
# zip, map, enumerate, iter as arguments
def f(xs): return [tuple(x) for x in xs]
def g(xs): return sum(xs)
---
assert f(zip([1, 2], 'ab')) == [(1, 'a'), (2, 'b')] and g(map(abs, [-1, -2])) == 3
assert f(enumerate('a')) == [(0, 'a')] and g(iter([1, 2])) == 3 and g(reversed([1, 2])) == 3 
assert g(filter(None, [0, 4])) == 4
# views and ranges as arguments
def f(xs): return sorted(xs)
---
d = {2: 'b', 1: 'a'}
assert f(d.keys()) == [1, 2] and f(d.values()) == ['a', 'b'] and f(d.items())[0] == (1, 'a')
assert f(range(3)) == [0, 1, 2]
# StringIO
import csv
def f(file): return [row[0] for row in csv.reader(file)]
def g(file): print('hello', file=file)
---
import io
assert f(io.StringIO('a,b\nc,d\n')) == ['a', 'c']
out = io.StringIO()
g(out)
assert out.getvalue() == 'hello\n'
# file-like methods
def f(file):
    first = file.readline()
    return first.strip(), file.read(), [line for line in file]
---
from io import StringIO, BytesIO
assert f(StringIO('a\nb\n')) == ('a', 'b\n', []) and f(BytesIO(b'x\ny')) == (b'x', b'y', [])
# class of the tests
def f(cls, *a): return cls(*a)
def g(x): return x.name, x.hello('you')
---
class A:
    def __init__(self, name): self.name = name
    def hello(self, who): return f'{self.name} greets {who}'
a = f(A, 'I')
assert isinstance(a, A) and a.name == 'I' and g(A('me')) == ('me', 'me greets you')
# isinstance with a class of the tests
def f(xs, kind): return [isinstance(x, kind) for x in xs]
def g(x): return type(x).__name__
---
class A: pass
class B(A): pass
assert f([A(), B(), 1], A) == [True, True, False] and g(B()) == 'B'
# attributes of an object of the tests
def f(node):
    node.value += 1
    node.items.append(node.value)
    return node
---
class Node:
    def __init__(self): self.value, self.items = 1, []
n = Node()
assert f(n) is n and n.value == 2 and n.items == [2]
# tree of the tests
def depth(t): return 0 if t is None else 1 + max(depth(t.left), depth(t.right))
---
class T:
    def __init__(self, left=None, right=None): self.left, self.right = left, right
assert depth(T(T(T()), T())) == 3 and depth(None) == 0
# objects of the tests compared and sorted by the program
def f(xs): return sorted(xs)[0]
def g(a, b): return a == b
def h(xs): return len(set(xs))
---
class A:
    def __init__(self, n): self.n = n
    def __lt__(self, o): return self.n < o.n
    def __eq__(self, o): return self.n == o.n
    def __hash__(self): return hash(self.n)
xs = [A(3), A(1)]
assert f(xs) is xs[1] and g(A(1), A(1)) and not g(A(1), A(2)) and h([A(1), A(1), A(2)]) == 2
# exception class of the tests
def f(kind): raise kind('from the tests')
def g(call, kind):
    try:
        call()
    except kind as error:
        return str(error)
---
class Mine(Exception): pass
try:
    f(Mine)
except Mine as error:
    assert str(error) == 'from the tests'
else:
    assert False
def fail(): raise Mine('inside')
assert g(fail, Mine) == 'inside' and g(lambda: 1 / 0, ZeroDivisionError) == 'division by zero'
# exception of the tests passes through the program
def f(g):
    try:
        return g()
    finally:
        f.cleaned = True
---
class Mine(Exception): pass
def fail(): raise Mine(3)
try:
    f(fail)
except Mine as error:
    assert error.args == (3,) and f.cleaned
else:
    assert False
# types as arguments
def f(xs, kind): return [x for x in xs if isinstance(x, kind)]
def g(kind): return kind()
---
from collections import OrderedDict
assert f([1, 'a', None], str) == ['a'] and g(list) == [] and g(OrderedDict) == {}
assert f([1, 'a'], (int, str)) == [1, 'a']
# module as an argument
def f(module, x): return module.floor(x)
---
import math
assert f(math, 2.5) == 2
# observer
class Subject:
    def __init__(self): self.subscribers = []
    def subscribe(self, g): self.subscribers.append(g)
    def emit(self, x):
        for g in self.subscribers: g(x)
---
seen = []
s = Subject()
s.subscribe(seen.append)
s.subscribe(lambda x: seen.append(-x))
s.emit(2)
assert seen == [2, -2]
# callback that calls the program again
def f(g, n): return g(n)
def double(x): return 2 * x
---
assert f(lambda n: double(n) + f(double, n), 3) == 12
# callback with an object of the program
class P:
    def __init__(self, x): self.x = x
def f(g): return g(P(4))
---
assert f(lambda p: p.x + 1) == 5
# namedtuple of the tests
def f(p): return p.x + p[1], type(p).__name__
def g(p): return p._replace(x=0)
---
from collections import namedtuple
P = namedtuple('P', 'x y')
assert f(P(1, 2)) == (3, 'P') and g(P(1, 2)) == P(0, 2)
# regular expression, random generator and partial as arguments
def f(pattern, s): return pattern.findall(s)
def g(r): return r.randint(1, 1)
def h(p): return p(3)
---
import re, random, functools
assert f(re.compile('[a-z]'), 'a1b') == ['a', 'b'] and g(random.Random(0)) == 1 and h(functools.partial(pow, 2)) == 8
# context manager of the tests
def f(cm):
    with cm as x: return x
---
class C:
    open = None
    def __enter__(self):
        self.open = True
        return 'inside'
    def __exit__(self, *a): self.open = False
c = C()
assert f(c) == 'inside' and c.open is False
# aware times
from datetime import datetime, timedelta, timezone
def f(): return datetime(2024, 1, 2, 3, tzinfo=timezone.utc)
def g(t): return t.astimezone(timezone(timedelta(hours=2)))
---
from datetime import datetime, timezone, timedelta
assert f() == datetime(2024, 1, 2, 3, tzinfo=timezone.utc) and f().tzinfo == timezone.utc
assert g(f()).hour == 5 and g(f()).utcoffset() == timedelta(hours=2)
# zones by name
from datetime import datetime
from zoneinfo import ZoneInfo
def f(t, name): return t.replace(tzinfo=ZoneInfo(name))
---
from datetime import datetime, timedelta
assert f(datetime(2024, 7, 1), 'Europe/Berlin').utcoffset() == timedelta(hours=2)
# defaultdict with its factory
from collections import defaultdict
def f(words):
    d = defaultdict(list)
    for w in words: d[len(w)].append(w)
    return d
---
d = f(['a', 'bb', 'c'])
assert d == {1: ['a', 'c'], 2: ['bb']} and d[9] == [] and d.default_factory is list and 9 in d
# defaultdict of a function
from collections import defaultdict
def f(): return defaultdict(lambda: 7)
---
d = f()
assert d['x'] == 7 and d == {'x': 7}
# nested defaultdict as an argument
def f(d): d['a']['b'] += 1
---
from collections import defaultdict
d = defaultdict(lambda: defaultdict(int))
f(d)
assert d['a']['b'] == 1
# counters
from collections import Counter
def f(s): return Counter(s)
---
assert f('aab').most_common(1) == [('a', 2)] and f('a') + f('b') == {'a': 1, 'b': 1} and f('a')['z'] == 0
# exact numbers
from fractions import Fraction
from decimal import Decimal
def f(): return Fraction(1, 3), Decimal('0.10')
---
from fractions import Fraction
from decimal import Decimal
a, b = f()
assert a + Fraction(1, 6) == Fraction(1, 2) and str(b) == '0.10' and b == Decimal('0.1')
# paths, identifiers and patterns as results
import pathlib, uuid, re
def f(): return pathlib.PurePosixPath('a') / 'b', uuid.UUID(int=5), re.compile('a+', re.I)
---
p, u, r = f()
assert p.name == 'b' and str(p) == 'a/b' and u.int == 5 and r.match('AA')
# a match object
import re
def f(s): return re.match(r'(\w)(\d)?', s)
---
m = f('a1')
assert m.group(1) == 'a' and m[2] == '1' and m.groups() == ('a', '1') and m and f('-') is None and m.span() == (0, 2)
# time as a structure
import time
def f(): return time.gmtime(0)
---
assert f().tm_year == 1970 and f()[1] == 1
# memoryview and bytes
def f(b): return memoryview(b)[1:]
def g(b): return bytes(reversed(b))
---
assert f(b'abc').tolist() == [98, 99] and g(b'ab') == b'ba' and f(b'abc')[0] == 98
# threads
import threading
def f(n):
    found, lock = [], threading.Lock()
    def work(i):
        with lock: found.append(i * i)
    ts = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for t in ts: t.start()
    for t in ts: t.join()
    return sorted(found)
---
assert f(5) == [0, 1, 4, 9, 16]
# thread pool
from concurrent.futures import ThreadPoolExecutor
def f(xs):
    with ThreadPoolExecutor(4) as pool: return list(pool.map(abs, xs))
---
assert f([-1, 2, -3]) == [1, 2, 3]
# producer and consumer
import queue, threading
def f(xs):
    q, out = queue.Queue(), []
    def consume():
        while (x := q.get()) is not None: out.append(x)
    t = threading.Thread(target=consume)
    t.start()
    for x in xs: q.put(x)
    q.put(None)
    t.join()
    return out
---
assert f([1, 2, 3]) == [1, 2, 3]
# asyncio inside
import asyncio
async def work(i):
    await asyncio.sleep(0.001)
    return i
async def main(): return await asyncio.gather(*(work(i) for i in range(3)))
def f(): return asyncio.run(main())
---
assert f() == [0, 1, 2]
# coroutine run by the tests
import asyncio
async def f(x):
    await asyncio.sleep(0)
    return x + 1
---
import asyncio
assert asyncio.run(f(1)) == 2
async def main():
    a, b = await asyncio.gather(f(1), f(2))
    return a + b + await f(3)
assert asyncio.run(main()) == 9
# coroutine function of the tests
import asyncio
async def twice(g): return await g(1) + await g(2)
---
import asyncio
async def g(x):
    await asyncio.sleep(0)
    return 10 * x
assert asyncio.run(twice(g)) == 30
# asynchronous generator and context
class C:
    async def __aenter__(self): return 5
    async def __aexit__(self, *a): return None
async def f(n):
    for i in range(n): yield i
---
import asyncio
async def main():
    async with C() as c: pass
    return [i async for i in f(3)], c
assert asyncio.run(main()) == ([0, 1, 2], 5)
# threads of asyncio
import asyncio, time
async def main(): return await asyncio.to_thread(sum, [1, 2])
def f(): return asyncio.run(main())
---
assert f() == 3
# much output
def f():
    for _ in range(3000): print('x' * 1000)
    return 1
---
assert f() == 1
# deep recursion
def f(n): return 0 if n == 0 else 1 + f(n - 1)
---
assert f(960) == 960
# own source
import inspect
def f(): return 1
def g(): return inspect.getsource(f)
---
assert g() == 'def f(): return 1\n'
# command line
import argparse, sys
def f(args=None):
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=3)
    return p.parse_args(args).n
---
assert f() == 3 and f(['--n', '5']) == 5
# a short sleep
import time
def f():
    time.sleep(0.2)
    return 1
---
assert f() == 1
# pickled objects
import pickle
class A:
    def __init__(self): self.x = 1
def f(): return pickle.loads(pickle.dumps(A())).x
---
assert f() == 1
# type checks at run time
import typing
from typing import Protocol, runtime_checkable
@runtime_checkable
class Sized2(Protocol):
    def size(self): ...
class A:
    def size(self): return 1
def f(): return isinstance(A(), Sized2), typing.get_type_hints(f)
---
assert f() == (True, {})
# names of Python's in the tests, not imported
import sys, math
from collections import Counter
def f(x): return sys.getsizeof(x)
def g(s): return Counter(s)
---
assert f([]) == sys.getsizeof([]) and g('aa') == Counter('aa') and math.floor(2.5) == 2
# asynchronous iteration and contexts
class A:
    async def __aenter__(self): return 3
    async def __aexit__(self, *a): return False
class It:
    n = 0
    def __aiter__(self): return self
    async def __anext__(self):
        self.n += 1
        if self.n > 3: raise StopAsyncIteration
        return self.n
async def numbers():
    yield 1
    yield 2
---
import asyncio
async def main():
    assert [x async for x in It()] == [1, 2, 3] and [x async for x in numbers()] == [1, 2]
    assert await anext(numbers()) == 1 and await anext(aiter(It())) == 1
    try:
        async with A() as x:
            raise ValueError(x)
    except ValueError as error:
        return error.args
assert asyncio.run(main()) == (3,)
# many lists, one after the other
def f(c): return c[0] + 1
---
cases = [[i] for i in range(1500)]
assert [f(c) for c in cases] == list(range(1, 1501))
# a list that the program keeps
kept = []
def f(c):
    kept.append(c)
    return len(kept)
def change():
    for each in kept: each.append(9)
def same(a, b): return any(a is each for each in kept) and b is kept[0]
---
a, b = [1], [2]
assert f(b) == 1 and f(a) == 2
change()
assert a == [1, 9] and b == [2, 9] and same(a, b)
# counts in a class of its own
from collections import Counter
class C(Counter):
    def top(self): return self.most_common(1)[0][0]
def f(s): return C(s)
---
from collections import Counter
assert f('aab') == Counter('aab') and Counter('aab') == f('aab') and f('aab').top() == 'a'
assert f('aab') - Counter('a') == Counter('ab') and Counter('aab') - f('a') == Counter('ab') and f('a') <= f('ab')
# callbacks from several threads
from concurrent.futures import ThreadPoolExecutor
def f(g, xs):
    with ThreadPoolExecutor(4) as pool: return list(pool.map(g, xs))
---
def g(x): return x + 1
for _ in range(3): assert f(g, list(range(50))) == list(range(1, 51))
# callbacks from a thread in the background
import threading, time
class W:
    def __init__(self, g):
        self.g = g
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
    def run(self):
        for i in range(5):
            time.sleep(0.01)
            self.g(i)
    def join(self): self.thread.join()
---
found = []
w = W(found.append)
w.join()
assert found == list(range(5))
# datetime as the program imports it
from datetime import datetime
def f(s): return datetime.strptime(s, '%Y')
---
assert f('2020') == datetime(2020, 1, 1) and f('2020') == datetime.strptime('2020', '%Y')
'''


BOM = Program("\ufeffdef f(): return 1\r\n", "assert f() == 1")

HONEST: dict[str, Program] = {"byte order mark": BOM}
for entry in TEXT.split("\n# ")[1:]:
    name, _, program = entry.partition("\n")
    code, _, tests = program.partition("---\n")
    HONEST[name] = Program(code, tests)
