"""What training a dictionary buys: language features next to directions, frozen dictionaries and neurons."""
