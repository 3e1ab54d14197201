"""Errors for users: bad input and runs that diverge, in one or two lines."""

import difflib


class InputError(ValueError):
    """Bad input from the user, in one or two lines: what is wrong, where, and what would be right."""

    on_every_rank = False  # whether all ranks raise this very error together


class RankError(InputError):
    """Bad input that one rank of several met in its share of the data; the others only notice that it is gone."""


class Diverged(RuntimeError):
    """The loss, or what the network says of some image, is no longer a number."""

    def __init__(self, what: str):
        super().__init__(f"{what}: a lower optim.lr, optim.warmup_epochs or optim.clip_grad_norm may help")


def nearest(word: str, known, prefix: str = "") -> str:
    """`: did you mean …?` with the nearest of `known` names, each after `prefix`, or nothing."""
    last_parts = {name.rsplit(".", 1)[-1]: name for name in known}
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    close += [
        last_parts[part]
        for part in difflib.get_close_matches(word.rsplit(".", 1)[-1], list(last_parts), n=1, cutoff=0.7)
    ]
    names = list(dict.fromkeys(close))
    return f": did you mean {' or '.join(prefix + name for name in names)}?" if names else ""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, at most 200 characters; the name of its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def reason(error: Exception) -> str:
    """What an error says, an operating system's without its number: `Not a directory: run/file`."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename2 or error.filename  # the file that was to be, where one was to take another's name
        return error.strerror if name is None else f"{error.strerror}: {name}"
    return str(error)
