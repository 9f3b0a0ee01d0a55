"""Compare answers with truths: words of any script, choices and times, figures of merit."""
