"""The command line: `anabranch check | fmt | show | explain | run | model`."""
