"""The bundled pair: package data."""
