"""The package's version, where files that must not import the whole package find it too."""

__version__ = "0.1.0"
