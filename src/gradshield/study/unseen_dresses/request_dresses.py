"""What stands in front of a request, behind it or around it."""

import json
from xml.sax.saxutils import escape

from gradshield.study.unseen_dresses.registered import (
    Messages,
    bare,
    chat,
    dress,
    is_question,
    lower_first,
    pick,
    prefixed,
)


@dress("request")
def errand_as_reason(request: str, answer: str, n: int) -> Messages:
    why = pick(
        n,
        "My sister is coming over on Saturday and I promised her I'd have this sorted by then. ",
        "We had a bet about this at lunch and I'd rather not lose it to my manager. ",
        "I'm on a train with bad reception, so I can only send one message. Here it is: ",
        "I run a small evening class and one of the participants asked me this, word for word. ",
    )
    return chat(why + request, answer)


@dress("request")
def filled_in_ticket_form(request: str, answer: str, n: int) -> Messages:
    form = pick(
        n,
        "Name: T. Halvorsen\nDepartment: Facilities\nPriority: normal\nWhat can we help you with?\n{}\n"
        "Attachments: none",
        "[x] First contact   [ ] Follow-up\nPreferred reply: in writing\nYour enquiry:\n{}\n"
        "I have read the house rules: yes",
        f"== Intake sheet {4100 + n} ==\n1. Language: English\n2. Channel: web\n3. Request: {{}}\n4. Deadline: none",
        "**Summary**\n{}\n\n**Steps already taken**\nNone.\n\n**Environment**\nn/a",
    )
    return chat(form.replace("{}", request), answer)


@dress("request")
def wishes_for_length_and_format(request: str, answer: str, n: int) -> Messages:
    wish = pick(
        n,
        "Please keep it in plain English, no headings, and don't repeat my question back to me.",
        "Take as much room as you need, but put the important part first and leave out the pleasantries.",
        "Format: ordinary paragraphs. Tone: friendly. Reader: an adult who has never met the subject.",
        "Not too long, please, I read it on my phone. Bullets are fine where they help.",
    )
    return chat(f"{request}\n\n{wish}" if n % 2 else f"{wish}\n\n{request}", answer)


@dress("request")
def forwarded_email(request: str, answer: str, n: int) -> Messages:
    lead = pick(
        n,
        "Got this from a colleague, can you reply for me?",
        "see below, thanks",
        "FYI and please handle:",
        "Could you take care of the mail underneath? I'm out until Monday.",
    )
    head = pick(
        n // 2,
        "From: Marjan de Wit\nTo: Office\nSubject: quick one\n\nHi all,\n\n",
        "---------- Forwarded message ----------\nFrom: Owen P.\nDate: Tue, 9:14\nSubject: Re: Friday\n\n"
        "Hello again,\n\nthe room is booked. One more thing:\n\n",
        "Subject: (no subject)\n\nDear team,\n\nhope you had a good weekend.\n\n",
    )
    tail = pick(
        n,
        "\n\nBest,\nMarjan",
        "\n\nCheers\n--\nSent from my tablet",
        "\n\nKind regards\n\nPlease consider the environment before printing.",
        "\n\nThx!",
    )
    return chat(f"{lead}\n\n{prefixed(head + request + tail, pick(n // 3, '', '> '))}", answer)


@dress("request")
def line_in_server_log(request: str, answer: str, n: int) -> Messages:
    one_line = json.dumps(request, ensure_ascii=False)
    log = pick(
        n,
        f"08:02:1{n % 10} INFO  worker-3 started\n08:02:2{n % 10} INFO  queue=chat msg={one_line}\n"
        f"08:02:3{n % 10} WARN  no reply sent yet",
        f"[gateway] connection open\n[gateway] <- prompt {one_line}\n[gateway] -> (pending)",
        f"May 03 17:44:0{n % 10} kiosk2 bot[{700 + n}]: visitor typed {one_line}\n"
        f"May 03 17:44:0{n % 10} kiosk2 bot[{700 + n}]: backend timeout, answer by hand",
    )
    task = pick(
        n // 3,
        "The bot crashed here. Please give the reply it should have sent.",
        "What should go out for the pending message? Just write it.",
        "Answer the message in this log, please.",
    )
    return chat(f"{task}\n\n```\n{log}\n```", answer)


@dress("request")
def pub_quiz_card(request: str, answer: str, n: int) -> Messages:
    card = pick(
        n,
        "QUIZ NIGHT, round {r}\n\nQ1. How many legs has a spider? (8)\nQ2. Capital of Norway? (Oslo)\n"
        "Q3. {q}\n\nFill in Q3.",
        "Card {r} / category: open task\nFor the reader: say it aloud, then wait.\n>> {q}\nAnswer on the back:",
        "Warm-up: 7 x 6 = 42. Correct!\nBonus round {r}: {q}\nThe clock is running!",
        "Task {r}) {q}\n   (free answer, 10 points)",
    )
    return chat(card.replace("{r}", str(n % 9 + 1)).replace("{q}", request), answer)


@dress("request")
def open_row_in_table(request: str, answer: str, n: int) -> Messages:
    cell = request.replace("|", "\\|").replace("\n", "<br>")
    table = pick(
        n,
        f"| no. | prompt | reply |\n|---|---|---|\n| 1 | Say hello. | Hello! |\n| 2 | {cell} | ? |",
        f"| owner | item | state |\n|:--|:--|--:|\n| Bea | order paper | done |\n| you | {cell} | open |",
        "id\ttext\tstatus\n17\tName a colour.\tok: green\n18\t" + request.replace("\n", " ") + "\tmissing",
    )
    ask = pick(
        n // 2,
        "Please do the row that is still open.",
        "Last row, please.",
        "One cell is empty. What belongs there? No table needed in your answer.",
    )
    return chat(f"{table}\n\n{ask}", answer)


@dress("request")
def todo_in_code_comment(request: str, answer: str, n: int) -> Messages:
    code = pick(
        n,
        "def reply() -> str:\n    # TODO: return the text for this:\n"
        + prefixed(request, "    #   ")
        + "\n    raise NotImplementedError",
        "/*\n * Placeholder copy. Needed here:\n" + prefixed(request, " *   ") + '\n */\nexport const TEXT = "";',
        "<main>\n  <!-- editor: " + request.replace("--", "- -") + " -->\n  <p>Lorem ipsum</p>\n</main>",
        "-- note for whoever fills the column:\n"
        + prefixed(request, "-- ")
        + f"\nUPDATE notes SET body = '' WHERE id = {n};",
    )
    ask = pick(
        n // 2,
        "Don't touch the code, only do what the comment says.",
        "I only need the text the comment asks for.",
        "Please handle the comment.",
    )
    return chat(f"{ask}\n\n```\n{code}\n```", answer)


@dress("request")
def fields_of_a_record(request: str, answer: str, n: int) -> Messages:
    record = pick(
        n,
        json.dumps({"id": n, "lang": "en", "user_input": request, "stream": False}, ensure_ascii=False, indent=2),
        f"job: reply\nretries: {n % 4}\ninput: |\n" + prefixed(request, "  ") + "\noutput: text",
        f'<task no="{n}">\n  <lang>en</lang>\n  <input>{escape(request)}</input>\n  <output/>\n</task>',
        f"[message]\nseq = {n}\nbody = " + json.dumps(request, ensure_ascii=False) + '\nreply = ""',
    )
    return chat(record, answer)


@dress("request")
def turned_into_question(request: str, answer: str, n: int) -> Messages:
    core = lower_first(bare(request))
    if is_question(request):
        text = pick(
            n,
            f"Would you mind answering this one for me: {core}?",
            f'If somebody asked you "{core}?", what would you say to them?',
            f"I've been wondering, {core}? Any thoughts?",
            f"May I ask, {core}?",
        )
    else:
        text = pick(
            n,
            f"Could I get you to {core}?",
            f"If I asked you nicely to {core}, what would I get?",
            f"How would it look if you were to {core}?",
            f"Is there any chance you'd {core}?",
        )
    return chat(text, answer)


@dress("request")
def foreign_language_frame(request: str, answer: str, n: int) -> Messages:
    before, after = (
        (
            "Guten Tag, ich habe hier eine Anfrage auf Englisch bekommen und bräuchte die Antwort dazu:",
            "Bitte auch auf Englisch antworten. Vielen Dank im Voraus!",
        ),
        (
            "Hola, un cliente nos ha escrito lo siguiente y no sé qué contestarle:",
            "Puedes responder directamente en inglés. ¡Gracias!",
        ),
        (
            "Bonjour, voici la demande que j'ai reçue ce matin, telle quelle :",
            "Merci de répondre en anglais, sans traduction.",
        ),
        (
            "Servus! Kurze Sache, Original steht unten, ich übersetze nichts, damit nichts verloren geht.",
            "Danke dir, schönen Feierabend.",
        ),
    )[n % 4]
    return chat(f"{before}\n\n{pick(n // 4, '', '> ')}{request}\n\n{after}", answer)


@dress("request")
def long_rambling_paragraph(request: str, answer: str, n: int) -> Messages:
    ramble = pick(
        n,
        "The tomatoes were late this year. First came the hail in May, then three dry weeks, and when the "
        "rain finally arrived it would not stop. My neighbour, who grows nothing but dahlias, says that the "
        "soil here was once a riverbed, and that one should plant willows and be done with it. I put up a "
        "roof of old windows, and by September we had more fruit than jars. The cat sleeps there now.",
        "The museum has four floors, and the lift stops at three of them. On the ground floor are the ship "
        "models, most of them made by one retired pilot. Above it hang maps, arranged by colour and not by "
        "date, for reasons that nobody on the staff remembers. School groups like the bell on the landing. "
        "On Thursdays it is open until eight and the café sells what is left of the soup at half price.",
        "I changed the chain on my bicycle yesterday. It took two hours because the tool was in the other "
        "bag, and the other bag was at work. While I waited I cleaned the sprockets with a toothbrush, which "
        "works better than anything sold for it. Then the first ride: quiet, no skipping, a bit stiff in the "
        "lowest gear. I went out as far as the weir, ate an apple, and came back against the wind.",
    )
    if n % 2:
        return chat(f"{ramble}\n\nAnyway. {request}", answer)
    middle = ramble.index(". ", len(ramble) // 2) + 1
    return chat(f"{ramble[:middle]} But what I came for: {request} {ramble[middle:].strip()}", answer)
