"""Tests; a package, so that Ray's workers can import the functions that tests launch."""
