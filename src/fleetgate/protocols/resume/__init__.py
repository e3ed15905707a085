"""How an answer that broke off continues at another engine: transcript, comparison, prefill, token ids."""
