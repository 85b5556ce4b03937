"""`minidiff completion`: a script with which bash and zsh complete commands and flags.

It holds every word there is, so that nothing of Python runs when TAB is pressed. Commands are found in our own table and not in one parser,
so packages that read a parser (shtab, argcomplete) would complete none of them.
"""

import re
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO

from minidiff.cli.help import HELP_ALL
from minidiff.cli.lists import LISTS

SCRIPT = """\
# Completion of minidiff for bash and zsh. In ~/.bashrc or ~/.zshrc:  source <(minidiff completion)
[ -z "$ZSH_VERSION" ] || {{ autoload -U +X compinit bashcompinit && compinit && bashcompinit; }}
_minidiff() {{
    local words= word="${{COMP_WORDS[COMP_CWORD]}}"
    case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
        *) [ "$COMP_CWORD" -gt 1 ] || words="{commands}" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _minidiff minidiff
"""


def completion() -> None:
    """Print a script that completes commands and flags in bash and zsh.

        minidiff completion

    This line in ~/.bashrc or ~/.zshrc is all that it takes: source <(minidiff completion)
    """
    from minidiff.cli.main import commands

    known = commands()
    words = {name: flags_of(command.run) for name, command in known.items()}
    for name in known:
        if " " in name:
            words.setdefault(name.split()[0], []).append(name.split()[1])
    print(script(words | {"list": [*LISTS]}), end="")


def flags_of(run) -> list[str]:
    """Return the flags of a command, as its --help-all shows them."""
    page = StringIO()
    with suppress(SystemExit), redirect_stdout(page):
        run([HELP_ALL])
    return re.findall(r"^  (--[\w-]+)", page.getvalue(), flags=re.MULTILINE)


def script(words: Mapping[str, list[str]]) -> str:
    """Return the script. words: what can follow each command; of one that has kinds, the kinds."""
    longest_first = sorted(words, key=lambda name: -len(name.split()))
    cases = [f'        "{name} "*) words="{" ".join(words[name])}" ;;' for name in longest_first]
    return SCRIPT.format(cases="\n".join(cases), commands=" ".join(dict.fromkeys(name.split()[0] for name in words)))
