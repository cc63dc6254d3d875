"""packcli: should I pack or pad my fine-tuning data, how, and what does it cost?"""

__version__ = "0.1.0"
