"""Items -> answers -> scores: the tasks, how they are asked, and how answers are judged. It knows no method and no record."""
