"""Anabranch: a language, a compiler and a runtime for adaptive parallel reasoning."""
