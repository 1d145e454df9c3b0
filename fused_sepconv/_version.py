"""The version, in the one place that the packaging, the package and the native module all read."""

__version__ = "0.1.0"
