"""One HTML file of a run, a study, or two of them: what it says, how it is drawn, how it is written."""
