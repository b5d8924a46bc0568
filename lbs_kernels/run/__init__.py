"""Running a program: the back ends, the choice between them, and the op that graphs see."""
