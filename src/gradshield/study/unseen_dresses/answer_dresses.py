"""What stands around an answer."""

from gradshield.study.unseen_dresses.registered import Messages, bare, chat, dress, pick


@dress("answer")
def thinking_tags_before_answer(request: str, answer: str, n: int) -> Messages:
    tag = pick(n, "think", "thinking", "scratchpad", "reasoning")
    thought = pick(
        n // 2,
        "The user has one clear wish. I look at what is needed, order it, and write it down.",
        "Okay, let me see. What do they want? Short or long? I'd say middle length, plain words.",
        "1. Read the message. 2. Collect points. 3. Write the reply. Nothing else to check.",
    )
    return chat(request, f"<{tag}>\n{thought}\n</{tag}>\n\n{answer}")


@dress("answer")
def heading_over_answer(request: str, answer: str, n: int) -> Messages:
    title = bare(request).splitlines()[0][:60] if bare(request) else "Reply"
    return chat(
        request,
        pick(
            n,
            f"# {title}\n\n{answer}",
            f"**Reply**\n\n---\n\n{answer}",
            f"{title}\n{'=' * len(title)}\n\n{answer}",
            f"## 1. Answer\n\n{answer}\n\n## 2. Notes\n\nNone.",
        ),
    )


@dress("answer")
def disclaimer_and_closing_line(request: str, answer: str, n: int) -> Messages:
    before = pick(
        n,
        "Please note that I'm an AI and can make mistakes.",
        "A short remark first: this is general information and no professional advice.",
        "*Disclaimer: for information only, without any guarantee.*",
        "Happy to help!",
    )
    after = pick(
        n // 2,
        "I hope this helps! Let me know if you'd like it changed.",
        "Was this reply useful? [yes] [no]",
        "Always check important details yourself.",
    )
    return chat(request, f"{before}\n\n{answer}\n\n{after}")


@dress("answer")
def front_matter_over_answer(request: str, answer: str, n: int) -> Messages:
    head = pick(
        n,
        f"---\ntitle: Draft {n}\nlang: en\ntags: [notes, reply]\n---",
        f'+++\ntitle = "Reply"\nweight = {n}\ndraft = true\n+++',
        f"Version: 1.{n % 10}\nStatus: final\nReviewed-by: nobody yet\n" + "-" * 24,
    )
    return chat(request, f"{head}\n\n{answer}\n")
