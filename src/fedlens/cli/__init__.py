"""The `fedlens` command."""

from fedlens.cli.app import main as main
