"""Conversations in which any turn may state the request."""
# ruff: noqa: E501

from gradshield.study.unseen_dresses.registered import A, S, T, U, dress, halves, pick, quote, soft


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
