"""Write the page of an evaluation: figures, confusions, wrong answers with pictures."""
