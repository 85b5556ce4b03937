from minidiff.cli.main import main

main()
