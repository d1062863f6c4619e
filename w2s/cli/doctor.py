"""w2s doctor."""

from w2s.cli.app import Debug, app, one_line


@app.command()
def doctor(debug: Debug = False) -> None:
    """Show what this machine can do, and what each missing piece would bring."""
    with one_line(debug):
        from w2s.bench.doctor import print_report

        print_report()
