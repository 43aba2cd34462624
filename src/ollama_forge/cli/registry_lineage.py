"""`registry`: where a model came from."""

from __future__ import annotations

import click

COMMANDS: tuple[click.Command, ...] = ()
