"""Survivors, each with the reason."""

from .mutate import Mutant

EXPLAINED: tuple = ()


def explanation(mutant: Mutant) -> str:
    return ""
