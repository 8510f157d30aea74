"""The one error that the tool reports to its user."""

from __future__ import annotations


class PatchError(Exception):
    """Something that keeps the patch from being built, applied or taken back.

    `file`, `scope` and `place` say where, as far as that is known: a path in the
    target, the dotted name of a function or class, and the statement in it.
    """

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        scope: str | None = None,
        place: str | None = None,
    ):
        super().__init__(reason)
        self.reason = reason
        self.file = file
        self.scope = scope
        self.place = place

    def at(self, file: str) -> PatchError:
        """The same error, said of `file`."""
        return PatchError(self.reason, file=file, scope=self.scope, place=self.place)

    def __str__(self) -> str:
        where = (self.file, self.scope, self.place)
        return ": ".join([part for part in where if part] + [self.reason])
