"""Forms in which people pack a request."""
# ruff: noqa: E501

from gradshield.study.unseen_dresses.registered import A, U, dress, pick, quote, soft


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
