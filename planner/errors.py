"""Errors that are the user's to mend: shown as one message, never as a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Work that cannot be done as asked: no plan fits, a file is damaged, the disk is full.

    The message says what was found, where (table, feature, file and row, or the config key's
    full path) and what to do about it.
    """

    exit_code = 1


class RequestError(UserError):
    """A malformed request: an unknown config key, a wrong type, a missing file."""

    exit_code = 2


class PlannerError(UserError):
    """A plan that cannot be made, or a plan that does not fit what it is used for."""
