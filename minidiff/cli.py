"""The command line."""
def main(): raise SystemExit(0)
