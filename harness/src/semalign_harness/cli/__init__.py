"""The command `semalign`: parse, call, print."""

from .main import main as main
