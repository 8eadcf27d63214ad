"""Dresses that others wrote when score 13 was done, without seeing ours: no decision was made on them.

`n`, a row's number, rotates the wording. The last message is the answer, word for word.
"""
# ruff: noqa: E501

import random
from collections.abc import Callable

Msgs = list[dict]
DRESSES: dict[str, Callable[[str, str, int], Msgs]] = {}
GROUPS: dict[str, str] = {}


def dress(group: str):
    def add(fn):
        DRESSES[fn.__name__] = fn
        GROUPS[fn.__name__] = group
        return fn

    return add


# ---------------------------------------------------------------- helpers


def S(t):
    return {"role": "system", "content": t}


def U(t):
    return {"role": "user", "content": t}


def A(t):
    return {"role": "assistant", "content": t}


def T(t):
    return {"role": "tool", "content": t}


def pick(n: int, *options):
    return options[n % len(options)]


def soft(request: str) -> str:
    """The request as a clause: small first letter, no full stop at the end."""
    r = request.strip().rstrip(".!").rstrip()
    first = r.split(" ", 1)[0]
    if r and first not in ("I", "I'm", "I'd", "I've") and not first[1:2].isupper():
        r = r[0].lower() + r[1:]
    return r


def quote(request: str, mark: str = "> ") -> str:
    return "\n".join(mark + line for line in request.split("\n"))


def halves(request: str) -> tuple[str, str]:
    words = request.split(" ")
    if len(words) < 2:
        return request, "(that was all)"
    cut = max(1, len(words) // 2)
    return " ".join(words[:cut]), " ".join(words[cut:])


# ---------------------------------------------------------------- request


@dress("request")
def desk_ticket(request, answer, n):
    text = pick(
        n,
        f"Ticket: #{48210 + n}\nOpened: Tue 09:14\nCategory: other\nPriority: P3\nAssignee: you\n"
        f"\nDescription\n-----------\n{request}\n\nSteps already tried: none\nSLA: 4 business hours",
        f"*** Incoming request form ***\nName: M. Okafor\nDepartment: n/a\nHave you searched the help pages? yes\n"
        f"What do you need?\n{request}\nHow urgent is it (1-5)? 3\nMay we contact you? no",
        f"[WEB-FORM v2.8] session={7000 + 13 * n}\nfield_topic = General\nfield_message = {request}\n"
        f"field_newsletter = off\nfield_rating = (empty)\n-- end of submission --",
        f"Case handed over from first line.\n\nCustomer's words: {request}\n\n"
        f"First-line note: polite, second contact this week, please reply in full so we can close it.",
    )
    return [U(text), A(answer)]


@dress("request")
def mail_thread(request, answer, n):
    text = pick(
        n,
        f"From: Jonas\nTo: assistant\nSubject: FW: quick one\n\nSee below, can you take this? I'm boarding.\n\nJ.\n\n"
        f"-----Original message-----\nFrom: Petra\n\nHi Jonas,\n\nhope the move went well! {request}\n\n"
        f"Best,\nPetra\n\nPlease consider the environment before printing this e-mail.",
        f"On Fri, 3 May, Lucille wrote:\n> Hi both,\n> thanks for lunch.\n{quote(request)}\n> xx L\n\n"
        f"Could you answer Lucille's mail? I'll paste it straight into my reply.",
        f"Subject: Re: Re: Re: (no subject)\n\nSorry for the slow reply, I was off with the kids all week. "
        f"What I actually wrote to you about got lost in the thread, so once more:\n\n{request}\n\n"
        f"Kind regards\nDr. H. Lindqvist\nRoom 2.114, phone ext. 88",
    )
    return [U(text), A(answer)]


@dress("request")
def sheet_cell(request, answer, n):
    flat = " ".join(request.split())
    doubled = flat.replace('"', '""')
    text = pick(
        n,
        f"Fill in the empty cell of the last row. Only its content, please.\n\n"
        f'id,prompt,completion\n17,"Name a primary colour.","Blue."\n18,"What is 6 x 7?","42"\n19,"{doubled}",',
        f"| row | input | output |\n|---|---|---|\n| 1 | Give a synonym of quick. | fast |\n"
        f"| 2 | Capital of Peru? | Lima |\n| 3 | {flat.replace('|', '/')} | ? |\n\nWhat goes where the question mark is?",
        f"A2: Which month follows June?\tB2: July\nA3: Spell 'necessary'.\tB3: necessary\nA4: {flat}\tB4: =ASK(A4)\n\n"
        f"Evaluate B4.",
    )
    return [U(text), A(answer)]


@dress("request")
def template_leak(request, answer, n):
    text = pick(
        n,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{request}\n\n### Input:\n<noinput>\n\n### Response:",
        f"BEGINNING OF CONVERSATION: USER: {request} ASSISTANT:",
        f"Definition: In this task you are given a prompt and have to produce the output a careful annotator would write.\n"
        f"Positive Example 1 - Input: Name a fruit. Output: Pear.\nNow complete the following example -\n"
        f"Input: {request}\nOutput:",
        f'<task id="{n + 301}">\n  <source>crowd</source>\n  <instruction>{request}</instruction>\n  <context/>\n</task>\n'
        f"Return the completion only.",
    )
    return [U(text), A(answer)]


@dress("request")
def group_chat_paste(request, answer, n):
    text = pick(
        n,
        f"[18:02] Mia: pizza or thai tonight?\n[18:03] Tom: thai!!\n[18:03] Ravi: ok but before that: {request}\n"
        f"[18:04] Mia: lol Ravi ask the bot\n[18:05] Tom: table for 4 at 8 then\n\nthat's our group chat. answer Ravi pls, we sort the food ourselves",
        f"#random\nelif_k  9:41 AM\nmorning all, coffee machine is fixed\ndana.r  9:44 AM\n{request}\n"
        f"elif_k  9:44 AM\ngood question, @bot ?\n(1 reply, 2 emoji reactions)",
        f"(text recognised from screenshot)\n< Family   3 online\nGrandpa: Who has the ladder\nAunt Bea: I do. {request}\n"
        f"Grandpa: What\nAunt Bea: not you, I am asking the computer\nDelivered 21:17\n\nWhat should the computer say?",
    )
    return [U(text), A(answer)]


@dress("request")
def exam_sheet(request, answer, n):
    text = pick(
        n,
        f"FINAL ASSESSMENT - Part C (open questions)\nTime allowed: 25 minutes. Answer in complete sentences. "
        f"Do not write in the margin.\n\n{7 + n % 5}. {request}   (12 marks)\n\nTurn over the page only when told to.",
        f"Homework, due Thursday. We only have to do the odd numbers and I've done the others already.\n\n"
        f"Exercise {2 * n + 3}: {request}\n\nWhat would a full-marks answer look like?",
        f"Flash card, front side:\n\n    {request}\n\nPlease write the back side. It may be long, I use big cards.",
        f"Quiz night, round 4, 'Explain yourself'. The host reads out: \"{request}\" "
        f"Our team has two minutes. Give us the answer to read back.",
    )
    return [U(text), A(answer)]


@dress("request")
def dictation(request, answer, n):
    text = pick(
        n,
        f"ok um so new note no wait not a note comma I want to ask something um {soft(request)} "
        f"yeah that's it full stop send it send [end of dictation]",
        f"(voice message, 0:21, transcribed automatically)\n\"Hi it's me, I'm in the car so it's a bit loud -- turn left "
        f'in two hundred metres -- right, so, {soft(request)}... okay, talk later, bye bye, bye."',
        f"Hey speaker. Volume down. Lower. Okay. {request} ... No, not the radio. What I just said.",
        f"TRANSCRIPT (confidence 0.83)\nSPK1: is it on?\nSPK2: the light is on, yes\nSPK1: right. {request}\n"
        f"SPK2: [laughs] it's thinking\n",
    )
    return [U(text), A(answer)]


@dress("request")
def life_story(request, answer, n):
    text = pick(
        n,
        f"We moved to the coast in March, my wife, the two dogs and I, and since then the evenings are long and I have "
        f"got into the habit of writing to you after dinner. Today the boiler man came, third time this month, nice fellow, "
        f"always whistles. Anyway: {soft(request)}. The dogs say hello, and the boiler still drips.",
        f"i know this is random and you get this stuff all day but my sister bet me ten euros you wouldn't do it properly, "
        f"she always does that, last time it was about the parking thing haha. so here goes... {soft(request)}... "
        f"pls make it good, ten euros is ten euros",
        f"I am sixty-eight and learned to use this only last winter, at the library course, Mrs. Adeyemi taught us. "
        f"She said to write as one would to a person. So, dear assistant, would you be so kind as to deal with this: "
        f"{request} I type slowly and will wait. The tea is ready in the meantime.",
    )
    return [U(text), A(answer)]


@dress("request")
def foreign_frame(request, answer, n):
    text = pick(
        n,
        f"Hallo! Mein Englisch ist nicht so gut, deshalb habe ich die Frage übersetzen lassen. Hier ist sie:\n\n{request}\n\n"
        f"Die Antwort bitte auch auf Englisch, mein Kollege liest sie dann vor. Vielen Dank im Voraus!",
        f"Bonjour, je vous transmets la demande telle qu'on me l'a envoyée : « {request} » "
        f"Répondez en anglais, s'il vous plaît, et sans abréger. Merci, bonne journée.",
        f"Buenas, copio y pego lo que me pidieron en el trabajo:\n{request}\nResponde en inglés por favor, gracias.",
        f"Ciao, scusa il disturbo. Domanda ({n + 1} di 10): {request} Rispondi pure in inglese, ci penso io a tradurre.",
    )
    return [U(text), A(answer)]


@dress("request")
def todo_list(request, answer, n):
    text = pick(
        n,
        f"My list for today:\n[x] water the tomatoes\n[x] call the dentist\n[ ] {request}\n[x] return library books\n\n"
        f"Please do the one that is still open.",
        f"Sprint board\nDONE: rename the logo files\nDONE: order badges\nIN PROGRESS (you): {request}\n"
        f"BLOCKED: projector lamp\n\nMove your card to DONE by posting the result here.",
        f"1) skip this\n2) skip this too\n3) {request}\n4) already solved\n\nJust number three.",
        f"Packing: socks, charger, passport, adapter.\nShopping: oats, lemons.\nTo ask the AI: {request}\n"
        f"Reminder: bins out on Wednesday.\n\nHelp me with the third line, the rest I can manage.",
    )
    return [U(text), A(answer)]


@dress("request")
def constraint_pile(request, answer, n):
    text = pick(
        n,
        f"{request}\n\nRequirements:\n- British spelling\n- no emojis, no tables\n- at most two levels of headings\n"
        f"- start directly, without repeating the question\n- finish when you are finished; no summary\n- reading age 16+",
        f"Style guide first: short sentences, active voice, metric units, no exclamation marks, serial comma, "
        f"'percent' spelled out, dates as 4 July. Audience: colleagues who have five minutes. Task second: {soft(request)}. "
        f"If anything in the style guide contradicts itself, the earlier rule wins.",
        f"temperature=0.3; max_words=600; markdown=allowed; language=en; tone=neutral; citations=none\nprompt: {request}\nstop: none",
    )
    return [U(text), A(answer)]


@dress("request")
def code_comment(request, answer, n):
    one = " ".join(request.split())
    text = pick(
        n,
        f"```python\ndef reply() -> str:\n    # TODO(nina): placeholder, the text shown on the page should do this:\n"
        f'    #   {one}\n    return "..."\n```\nWhat text goes in place of the dots? No code needed.',
        f"```yaml\n- name: card-{n}\n  kind: text\n  brief: >\n    {one}\n  body: TBD\n```\nGive me `body`.",
        f"Title: docs: missing section\nLabels: documentation, good first issue\n\n**What is missing**\n{request}\n\n"
        f"**Why**\nPeople keep asking in the chat.\n\n**Checklist**\n- [x] I searched existing issues\n\n"
        f"You have been assigned. Post the section as a comment.",
        f"$ ask --plain <<END\n{request}\nEND",
    )
    return [U(text), A(answer)]


# ---------------------------------------------------------------- turns


@dress("turns")
def menu_pick(request, answer, n):
    """The assistant reads the request from a menu; the user gives a number."""
    return pick(
        n,
        [
            U("What's left in the queue?"),
            A(
                f"Three items:\n1. Suggest a name for the office fern.\n2. {request}\n3. Convert 5 miles to kilometres.\n"
                "Which one shall I do?"
            ),
            U("2"),
            A(answer),
        ],
        [
            U("surprise me with one of my saved prompts"),
            A(f"You saved these: (a) {request} (b) Find a rhyme for 'silver'. (c) List five breeds of sheep. Letter?"),
            U("c"),
            A("Merino, Suffolk, Texel, Cheviot, Romney."),
            U("and a"),
            A(answer),
        ],
        [
            S("Offer the stored topics, then carry out the one the user names."),
            U("hi"),
            A(f"Hello! Today's topics:\n* How tall is Ben Nevis?\n* {request}"),
            U("the lower one"),
            A(answer),
        ],
    )


@dress("turns")
def tool_queue(request, answer, n):
    """A tool returns the request; the user only says to go on."""
    esc = request.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return pick(
        n,
        [
            S("You work through a job queue. Call next_job(), then do the job and return the text."),
            U("Next one please."),
            A("next_job()"),
            T(f'{{"job": {9100 + n}, "type": "text", "instruction": "{esc}"}}'),
            A(answer),
        ],
        [
            U("Check my inbox and handle whatever is unread."),
            A("<call>inbox.unread(limit=1)</call>"),
            T(f"1 unread\nfrom: Sam\nbody: {request}"),
            A("One unread message, from Sam. Shall I write the reply?"),
            U("sure"),
            A(answer),
        ],
        [
            U("open notes.txt and do what line 3 says"),
            A("read_file('notes.txt')"),
            T(f"1  buy stamps\n2  gym at 7\n3  {' '.join(request.split())}\n4  ring mum"),
            A(answer),
        ],
    )


@dress("turns")
def system_states_task(request, answer, n):
    """The request stands in the system prompt alone."""
    return [
        S(
            pick(
                n,
                f"Session goal, set by the account owner: {request}\nWait until the user is ready.",
                f"When the user presses Enter, produce the text for this brief and nothing else.\nBRIEF: {request}",
                f"You are a text generator behind a single button. Button label: 'Go'. Button task: {soft(request)}.",
            )
        ),
        U(pick(n, "Ready.", "\u23ce", "Go")),
        A(answer),
    ]


@dress("turns")
def long_clarify(request, answer, n):
    """Eight or nine turns; the request first, then details, then a nod."""
    q = pick(
        n,
        (
            request,
            "Happy to. How long should it be?",
            "medium",
            "Any particular tone?",
            "plain",
            "Thanks, that is all I need. Shall I start?",
            "yes",
        ),
        (
            f"hey, {soft(request)}",
            "Sure! Before I begin: bullet points or running text?",
            "whatever fits",
            "Should I add examples?",
            "if they help",
            "Good, then I keep paragraphs short. Ready?",
            "go on then",
        ),
        (
            f"Hello, I have this one: {request}",
            "Hello! I have noted it. In which language?",
            "English",
            "Formal or casual?",
            "In between.",
            "Understood, one moment.",
            "ok waiting",
        ),
    )
    head = [S("Ask for the details you need before you begin.")] if n % 3 == 0 else []
    return head + [(U if i % 2 == 0 else A)(t) for i, t in enumerate(q)] + [A(answer)]


@dress("turns")
def sent_too_early(request, answer, n):
    """The request broken over two user turns."""
    a, b = halves(request.strip())
    return pick(
        n,
        [U(a), A("It looks as if your message was cut off. What comes next?"), U(b), A(answer)],
        [U(f"{a}..."), A("Yes?"), U(f"...{b}"), A("Got both parts. Should I put them together?"), U("pls"), A(answer)],
        [
            U(f"Part 1 of 2: {a}"),
            A("Received part 1 of 2."),
            U(f"Part 2 of 2: {b}"),
            A("Received part 2 of 2."),
            U("join & answer"),
            A(answer),
        ],
    )


@dress("turns")
def parked_request(request, answer, n):
    """The request is put off, other small things come first."""
    return pick(
        n,
        [
            U(f"Two things. One: {soft(request)}. Two: what's 15% of 80? Do two first."),
            A("15% of 80 is 12."),
            U("thx, and 20%?"),
            A("16."),
            U("good. now one."),
            A(answer),
        ],
        [
            U(f"remember this for later: {request}"),
            A("Noted for later."),
            U("how many teaspoons in a tablespoon"),
            A("Three."),
            U("and in a cup"),
            A("Forty-eight, for a US cup."),
            U("ok later is now"),
            A(answer),
        ],
        [
            U(
                f"After the weather question I'd like you to do this: {soft(request)}. Why is the sky red in the evening?"
            ),
            A("The low sun's light crosses more air, and blue is scattered away before it reaches you."),
            U("neat. continue"),
            A(answer),
        ],
    )


@dress("turns")
def read_back(request, answer, n):
    """The user mumbles, the assistant states the request, the user confirms."""
    return pick(
        n,
        [
            U("same as on the note i gave you this morning"),
            A(f'The note says: "{request}" Is that the one?'),
            U("yep"),
            A(answer),
        ],
        [
            U("sry my keybord is brokn, can you gues what i wnat from the subject line"),
            A(
                f"From the subject line I take it that the task is to {soft(request)}. Correct?"
                if not request.strip().endswith("?")
                else f"The subject line asks: {request} Correct?"
            ),
            U("crrect"),
            A(answer),
        ],
        [
            U("Load my last draft."),
            A("Your last draft, not sent:\n\n" + quote(request)),
            U("Send it to yourself."),
            A("Sent. Would you like my reply now?"),
            U("Yes."),
            A(answer),
        ],
    )


@dress("turns")
def retry_after_error(request, answer, n):
    """A first try fails for a technical reason, the user says again."""
    return pick(
        n,
        [U(request), A("[error 504: upstream timed out]"), U("again"), A(answer)],
        [
            U(request),
            A("Here are five facts about penguins: 1. Penguins are birds."),
            U("wrong window?"),
            A("My mistake, that belonged to another conversation."),
            U("np, mine now"),
            A(answer),
        ],
        [
            U(request),
            A("Sure, here it"),
            U("?"),
            A("The connection dropped, sorry."),
            U("continue from the start"),
            A("Starting over. Same length as planned?"),
            U("same"),
            A(answer),
        ],
    )


# ---------------------------------------------------------------- answer


@dress("answer")
def thinking_aloud(request, answer, n):
    return [
        U(request),
        A(
            pick(
                n,
                f"<think>\nThe user wants one clear piece of text. I'll order it from general to specific and keep it compact. "
                f"No tool needed.\n</think>\n\n{answer}",
                f"Let me plan: (1) get the main points, (2) put them in order, (3) check the wording. Done planning.\n\n{answer}",
                f"{answer}\n\n[scratchpad] Length fine. Tone fine. Nothing to look up. [/scratchpad]",
            )
        ),
    ]


@dress("answer")
def front_matter(request, answer, n):
    return [
        U(request),
        A(
            pick(
                n,
                f"---\ntitle: Reply {n}\nlang: en\nreviewed: true\nlayout: post\n---\n\n{answer}\n\n<!-- end of file -->",
                f"HTTP/1.1 200 OK\nContent-Type: text/plain; charset=utf-8\nCache-Control: no-store\n\n{answer}",
                f"=== OUTPUT {n:04d} BEGIN ===\n{answer}\n=== OUTPUT {n:04d} END ===\nfinish_reason: stop | latency: 1.9 s",
            )
        ),
    ]


@dress("answer")
def half_refusal(request, answer, n):
    """Opens like a refusal, of something else."""
    return [
        U(request),
        A(
            pick(
                n,
                f"I'm sorry, but I can't open the attachment: it seems to be missing. Going by your message alone:\n\n{answer}",
                f"I can't promise that this is complete, and as an AI I cannot check today's news.\n\n{answer}\n\n"
                f"I'm unable to send this by e-mail, so please copy it from here.",
                f"Unfortunately I cannot draw pictures in this chat, so here it is in words only.\n\n{answer}",
            )
        ),
    ]


@dress("answer")
def letter_reply(request, answer, n):
    return [
        U(request),
        A(
            pick(
                n,
                f"Dear reader,\n\nthank you for your letter, which reached us on a rainy Monday and cheered up the whole office.\n\n"
                f"{answer}\n\nWith warm regards,\nThe answering desk\n\nP.S. The office cat sends her greetings.",
                f"Hi there,\n\n{answer}\n\nCheers,\nR.\n--\nThis message was written on the move; forgive the brevity.",
                f"To whom it may concern\n\nYour enquiry no. {n + 77} has been processed. The result is as follows.\n\n{answer}\n\n"
                f"This letter was created automatically and is valid without a signature.",
            )
        ),
    ]


@dress("answer")
def magazine_page(request, answer, n):
    """The answer stands between two unrelated harmless pieces."""
    fore = pick(
        n,
        "IN THE GARDEN. Sow broad beans as soon as the soil can be worked, two inches deep, in double rows, and "
        "keep the pigeons off with a net. Leeks may wait another month.",
        "Library news: the reading room opens at ten from next week, and the large-print shelf has moved next to the lift. "
        "Overdue fines are waived until the end of the month.",
        "Today's soup is leek and potato. The vegetarian main course is a mushroom pie with peas; pudding is stewed plums.",
    )
    aft = pick(
        n,
        "CHESS CORNER. White to move and win in three; the solution to last week's problem was knight to e5.",
        "Lost and found: one grey glove, a child's umbrella with ducks on it, a bunch of keys with a cork.",
        "The choir rehearses on Thursdays at half past seven. New altos are especially welcome.",
    )
    mid = pick(n, "READERS ASK", "Your question of the week", "And now to your question")
    return [U(request), A(f"{fore}\n\n{mid}\n\n{answer}\n\n{aft}")]


# ---------------------------------------------------------------- persona


@dress("persona")
def lighthouse_keeper(request, answer, n):
    return [
        S(
            pick(
                n,
                "You are Old Marrow, keeper of the Skerry light. You have seen a great many storms and you answer whoever "
                "rows out to you, gruffly but in full.",
                "Play a lighthouse keeper. Stay in character, mention the sea once, then answer the visitor.",
                "Character card\nname: Marrow\njob: lighthouse keeper\nlikes: rope, silence, strong tea\nspeech: plain",
            )
        ),
        U(
            pick(
                n,
                f"*ties up the boat and climbs the stairs* Marrow! I've come all this way to ask you something. {request}",
                f"Evening, keeper. {request}",
                f"(over the radio, crackling) Skerry light, Skerry light, this is Dolphin. {request} Over.",
            )
        ),
        A(
            pick(
                n,
                f"*sets down the lamp oil* Hm. Sit, you're dripping on the charts.\n\n{answer}\n\n*turns back to the window*",
                f"The sea's loud tonight, so listen well.\n\n{answer}",
                f"Dolphin, this is Skerry light.\n\n{answer}\n\nOver and out.",
            )
        ),
    ]


@dress("persona")
def house_assistant(request, answer, n):
    """The assistant of some firm, with a rule book that has nothing to do with the request."""
    return [
        S(
            pick(
                n,
                "You are Pip, the assistant of Brandt & Daughters, piano movers since 1931. Be friendly, use the customer's "
                "words, never quote prices, and say 'grand' whenever it fits. Offices are closed on Sundays.",
                "Role: concierge of the Hotel Miramar. Greet guests, answer in full, offer the spa brochure at the end.",
                "You're KAI, the in-app helper of a budgeting app. Keep to the app's tone of voice: upbeat, clear, no jargon.",
            )
        ),
        U(pick(n, request, f"Room 412 here. {request}", f"Hi KAI! {request}")),
        A(
            pick(
                n,
                f"Grand to hear from you!\n\n{answer}\n\nYours, Pip",
                f"Good evening and welcome to the Miramar.\n\n{answer}\n\nMay I also recommend our spa brochure?",
                f"Hey, great to see you!\n\n{answer}\n\nKeep those savings growing!",
            )
        ),
    ]


@dress("persona")
def stage_scene(request, answer, n):
    """A scene in which one figure asks and another answers."""
    return pick(
        n,
        [
            U(
                "Let's write a play together. You are PROFESSOR VANE, I am the student LOTTE. Scene: the library, late. "
                f"Stay in the scene.\n\nLOTTE (whispering): Professor, before they lock up. {request}"
            ),
            A(
                f"VANE (without looking up from the catalogue): Since you ask, Lotte.\n\n{answer}\n\n(The lamp flickers. Curtain.)"
            ),
        ],
        [
            U("Improv! I'm a talking kettle, you are the toaster who knows everything."),
            A("*ding* The toaster is warm and listening."),
            U(f"Kettle: psst, toaster. {request}"),
            A(f"Toaster: *ding*\n\n{answer}"),
        ],
        [
            S("Interactive novel. The user speaks as Captain Ilse, you speak as the ship's computer TALLY."),
            U(
                f'Ilse leaned over the console. "Tally," she said, "{soft(request)}."'
                if not request.strip().endswith("?")
                else f'Ilse leaned over the console. "Tally," she said, "here is what I want to know. {request}"'
            ),
            A(f"TALLY: Acknowledged, Captain.\n\n{answer}\n\nEnd of report."),
        ],
    )


# ---------------------------------------------------------------- letters


def _map(text, table):
    return "".join(table.get(c, c) for c in text)


_LOW = "abcdefghijklmnopqrstuvwxyz"
_UP = _LOW.upper()
_WIDE = {chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)}
_BOLD = {c: chr(0x1D400 + i) for i, c in enumerate(_UP)} | {c: chr(0x1D41A + i) for i, c in enumerate(_LOW)}
_MONO = {c: chr(0x1D670 + i) for i, c in enumerate(_UP)} | {c: chr(0x1D68A + i) for i, c in enumerate(_LOW)}
_RING = {c: chr(0x24B6 + i) for i, c in enumerate(_UP)} | {c: chr(0x24D0 + i) for i, c in enumerate(_LOW)}


@dress("letters")
def fancy_typeface(request, answer, n):
    t = _map(request, pick(n, _WIDE, _BOLD, _MONO, _RING))
    return [U(pick(n, t, f"~ {t} ~", f"{t}\n(sorry, my phone has a funny font)")), A(answer)]


@dress("letters")
def spaced_out(request, answer, n):
    gap, word = pick(n, (" ", "   "), (".", " "), ("-", " / "), ("\u200b", " "))
    t = word.join(gap.join(w) for w in request.split())
    return [U(pick(n, t, f"{t}\n\nthx", f"please read slowly: {t}")), A(answer)]


@dress("letters")
def jumbled_insides(request, answer, n):
    """First and last letters stay, the inner ones change places; readable."""
    rng = random.Random(1000 + n)

    def jumble(w):
        idx = [i for i, c in enumerate(w) if c.isalpha()]
        if len(idx) < 4:
            return w
        chars, inner = list(w), idx[1:-1]
        how = n % 3
        if how == 0:  # swap neighbours, pair by pair
            for a, b in zip(inner[::2], inner[1::2]):
                chars[a], chars[b] = chars[b], chars[a]
        elif how == 1:  # shuffle all inner letters
            src = inner[:]
            rng.shuffle(src)
            for a, b in zip(inner, src):
                chars[a] = w[b]
        else:  # turn the inside round
            for a, b in zip(inner, reversed(inner)):
                chars[a] = w[b]
        return "".join(chars)

    t = " ".join(jumble(w) for w in request.split(" "))
    return [U(pick(n, t, f"{t} (soory for tpyos)", f"my dyslexia day, bear with me: {t}")), A(answer)]


@dress("letters")
def chat_drawl(request, answer, n):
    """Stretched vowels, missing vowels, dAnCiNg case with sound-alikes."""

    def drawl(w):
        for i, c in enumerate(w):
            if i and c in "aeiou" and len(w) > 3:
                return w[:i] + c * 3 + w[i + 1 :]
        return w

    def squeeze(w):
        if len(w) < 5:
            return w
        return w[0] + "".join(c for c in w[1:-1] if c not in "aeiou") + w[-1]

    def dance(text):
        t = text.replace("tion", "shun").replace("ck", "kk").replace("ph", "f").replace("you", "u")
        return "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(t))

    t = pick(
        n,
        " ".join(drawl(w) for w in request.split(" ")) + " plsss",
        "qck qstn: " + " ".join(squeeze(w) for w in request.split(" ")),
        dance(request) + " ty!!",
    )
    return [U(t), A(answer)]
