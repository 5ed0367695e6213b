"""Does a slider move what it is named after, how much else, and what does it cost?"""
