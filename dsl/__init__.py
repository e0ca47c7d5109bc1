"""The language: grammar, AST, parser, checks, printer, diagnostics."""
