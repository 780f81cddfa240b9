"""Word lists of the formality model, written for this project: function words, and words of talk
and of letters.
"""


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = _set("the a an")
PREPOSITIONS = _set(
    "of in to for with on at by from into through between among within against during toward"
    " towards upon regarding concerning under over across throughout beyond despite without per via"
    " amid along"
)
FIRST_PERSON = _set("i me my mine myself i'm i've i'd i'll im ive")
SECOND_PERSON = _set(
    "you your yours yourself yourselves you're you've you'll you'd u ur ya youre y'all"
)
OTHER_PRONOUNS = _set(
    "he she him her they them it his hers he's she's they're it's himself herself themselves"
)
AUXILIARIES = _set(
    "is are was were be been being am do does did has have had will would can could should don't"
    " doesn't didn't isn't aren't wasn't weren't won't wouldn't can't couldn't shouldn't hasn't"
    " haven't hadn't"
)
FORMAL_LINKS = _set(
    "however therefore moreover furthermore thus hence whereas although consequently nevertheless"
    " nonetheless accordingly whereby wherein thereby herein notwithstanding whilst albeit namely"
    " likewise conversely subsequently whose whom which such former latter respectively as provided"
    " unless whether upon"
)
VAGUE = _set(
    "really very just pretty so too much lot lots thing things stuff something anything everything"
    " someone anyone everyone somebody anybody everybody nobody nothing kind sort kinda sorta"
    " actually totally basically literally seriously super quite maybe probably anyway anyways bit"
    " way even ever never always all only still already again here there now then"
)
THOUGHT = _set(
    "think know feel guess hope want like love mean believe wish hate thought knew felt wanted"
    " liked loved hoped bet wonder remember forget worry sure thinks knows wants likes thinking"
    " trying wonder wondering glad happy sorry"
)
EVERYDAY_VERBS = _set(
    "get got gets getting gotten go goes going went gone put puts take took keep kept come came"
    " make made let lets say said says saying tell told look looks looking see saw seen try tried"
    " give gave gives find found ask asked talk talking need needs start stop turn work works help"
    " show happen happened call called wait buy run pick check"
)
PLAIN_WORDS = _set(
    "good bad nice big great cool cute dumb stupid crazy weird awful awesome funny silly fun best"
    " worst better okay fine hard easy old guy guys kid kids mom dad mum folks friend friends girl"
    " boy man people bunch couple ton tons money job day night week today tomorrow tonight right"
    " wrong true whole yet up out off down back around about because cause if when why how what who"
    " where"
)
TALK = _set(
    "yeah yes yep yup yea nope nah no oh ah uh um hmm hm wow hey hi hello ok okay well please pls"
    " plz thanks thx thank haha ha lol hahaha bye gosh damn yay ugh huh aww oops whoa yikes cheers"
    " congrats dear god jeez"
)
SLANG = _set(
    "gonna wanna gotta dunno lemme gimme outta kinda sorta cuz coz cos cause 'cause til u ur r ppl"
    " b4 btw imo imho idk omg wtf lmao rofl lol brb tbh fyi asap dude bro buddy pal mate man cop"
    " cops buck bucks chick dudes freak freaking freakin fuckin fuck fucking shit shitty crap"
    " crappy sucks suck sucked ass hell damn bloody bitch ain't aint yall y'all nuts jerk idiot"
    " loser hottie hot sexy sick lame geek nerd booze cash grub yummy vibe vibes bummed busted"
    " screw screwed wimp gross whatever whatcha gotcha ya yo em 'em n nite thru tho luv wat wut cya"
    " rly srsly plz thnx thx ty np ima imma tryna doc docs pic pics info ad prob probs def abt bc"
    " bf gf"
)
LETTERED = _set(
    "regarding concerning request require required requires obtain obtained provide provides"
    " provided providing inform informed assist assistance appreciate sincerely gratitude grateful"
    " kindly sufficient insufficient additional numerous several various significant substantial"
    " considerable considerably approximately prior subsequent commence purchase reside resides"
    " ensure demonstrate demonstrates demonstrated indicate indicates indicated suggest suggests"
    " establish established determine determined conduct conducted receive received contain"
    " contains contained include includes including consist constitute constitutes represent"
    " represents maintain maintained achieve achieved acquire conclude concluded consider"
    " considered regard regarded appropriate necessary essential particular particularly primarily"
    " primary principal majority minority individual individuals person persons children parents"
    " physician residents attorney vehicle residence premises employment matter manner extent"
    " degree purpose result results response accordance respect behalf reference opportunity"
    " recommendation recommend advise advised request requested permit permitted prohibit"
    " prohibited submit submitted proceed proceedings attend attended remain remains remained"
    " appear appears appeared cease inquire enquire inquiry desire wish shall may must ought might"
    " cannot not furthermore immediately entirely extremely relatively generally specifically"
    " currently previously initially ultimately effectively efficiently respectfully upon"
)
FUNCTION_WORDS = (
    ARTICLES | PREPOSITIONS | FIRST_PERSON | SECOND_PERSON | OTHER_PRONOUNS | AUXILIARIES
    | _set(
        "and or but nor that this these those who which what we us our not no if than then as so"
    )
)  # fmt: skip
CLASSES = {
    "prepositions": PREPOSITIONS,
    "first_person": FIRST_PERSON,
    "second_person": SECOND_PERSON,
    "other_pronouns": OTHER_PRONOUNS,
    "auxiliaries": AUXILIARIES,
    "formal_links": FORMAL_LINKS,
    "vague": VAGUE,
    "thought": THOUGHT,
    "everyday_verbs": EVERYDAY_VERBS,
    "plain_words": PLAIN_WORDS,
    "talk": TALK,
    "slang": SLANG,
    "lettered": LETTERED,
}
