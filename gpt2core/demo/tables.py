"""Hand-written tables of facts, each larger than one world needs.

No word is in two tables, except adjectives with an antonym. Entries with two correct answers are left out: countries on
two continents or with two seats of government, verbs with two past tenses, words of two parts of speech.
"""


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Parse a table: a semicolon or a line break ends a row, and a bar ends a cell."""
    rows = text.replace("\n", ";").split(";")
    return tuple(tuple(cell.strip() for cell in row.split("|")) for row in rows if row.strip())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# country | capital | another city | continent | nationality
COUNTRIES = _rows("""
France|Paris|Marseille|Europe|French
Germany|Berlin|Munich|Europe|German
Italy|Rome|Milan|Europe|Italian
Spain|Madrid|Barcelona|Europe|Spanish
Portugal|Lisbon|Porto|Europe|Portuguese
Poland|Warsaw|Krakow|Europe|Polish
Greece|Athens|Thessaloniki|Europe|Greek
Austria|Vienna|Salzburg|Europe|Austrian
Hungary|Budapest|Debrecen|Europe|Hungarian
Norway|Oslo|Bergen|Europe|Norwegian
Sweden|Stockholm|Gothenburg|Europe|Swedish
Denmark|Copenhagen|Aarhus|Europe|Danish
Finland|Helsinki|Tampere|Europe|Finnish
Ireland|Dublin|Galway|Europe|Irish
Belgium|Brussels|Antwerp|Europe|Belgian
Switzerland|Bern|Zurich|Europe|Swiss
Croatia|Zagreb|Dubrovnik|Europe|Croatian
Romania|Bucharest|Timisoara|Europe|Romanian
Bulgaria|Sofia|Plovdiv|Europe|Bulgarian
Ukraine|Kyiv|Lviv|Europe|Ukrainian
Serbia|Belgrade|Nis|Europe|Serbian
Slovakia|Bratislava|Kosice|Europe|Slovak
Lithuania|Vilnius|Kaunas|Europe|Lithuanian
Estonia|Tallinn|Tartu|Europe|Estonian
Latvia|Riga|Liepaja|Europe|Latvian
Albania|Tirana|Durres|Europe|Albanian
Iceland|Reykjavik|Akureyri|Europe|Icelandic
Japan|Tokyo|Osaka|Asia|Japanese
China|Beijing|Shanghai|Asia|Chinese
India|New Delhi|Mumbai|Asia|Indian
Pakistan|Islamabad|Lahore|Asia|Pakistani
Vietnam|Hanoi|Da Nang|Asia|Vietnamese
Thailand|Bangkok|Chiang Mai|Asia|Thai
Cambodia|Phnom Penh|Siem Reap|Asia|Cambodian
Mongolia|Ulaanbaatar|Erdenet|Asia|Mongolian
Iran|Tehran|Isfahan|Asia|Iranian
Iraq|Baghdad|Basra|Asia|Iraqi
Jordan|Amman|Aqaba|Asia|Jordanian
Lebanon|Beirut|Sidon|Asia|Lebanese
Saudi Arabia|Riyadh|Jeddah|Asia|Saudi
Oman|Muscat|Salalah|Asia|Omani
Bangladesh|Dhaka|Chittagong|Asia|Bangladeshi
Afghanistan|Kabul|Kandahar|Asia|Afghan
Syria|Damascus|Aleppo|Asia|Syrian
Kenya|Nairobi|Mombasa|Africa|Kenyan
Ghana|Accra|Kumasi|Africa|Ghanaian
Nigeria|Abuja|Lagos|Africa|Nigerian
Ethiopia|Addis Ababa|Gondar|Africa|Ethiopian
Morocco|Rabat|Casablanca|Africa|Moroccan
Tunisia|Tunis|Sfax|Africa|Tunisian
Algeria|Algiers|Oran|Africa|Algerian
Libya|Tripoli|Benghazi|Africa|Libyan
Senegal|Dakar|Touba|Africa|Senegalese
Mali|Bamako|Timbuktu|Africa|Malian
Uganda|Kampala|Entebbe|Africa|Ugandan
Zambia|Lusaka|Ndola|Africa|Zambian
Zimbabwe|Harare|Bulawayo|Africa|Zimbabwean
Angola|Luanda|Benguela|Africa|Angolan
Mozambique|Maputo|Beira|Africa|Mozambican
Madagascar|Antananarivo|Toamasina|Africa|Malagasy
Cameroon|Yaounde|Douala|Africa|Cameroonian
Namibia|Windhoek|Swakopmund|Africa|Namibian
Sudan|Khartoum|Omdurman|Africa|Sudanese
Malawi|Lilongwe|Blantyre|Africa|Malawian
Canada|Ottawa|Toronto|North America|Canadian
Cuba|Havana|Holguin|North America|Cuban
Jamaica|Kingston|Montego Bay|North America|Jamaican
Honduras|Tegucigalpa|San Pedro Sula|North America|Honduran
Nicaragua|Managua|Masaya|North America|Nicaraguan
Brazil|Brasilia|Rio de Janeiro|South America|Brazilian
Peru|Lima|Cusco|South America|Peruvian
Colombia|Bogota|Medellin|South America|Colombian
Ecuador|Quito|Guayaquil|South America|Ecuadorian
Venezuela|Caracas|Maracaibo|South America|Venezuelan
Uruguay|Montevideo|Salto|South America|Uruguayan
Paraguay|Asuncion|Encarnacion|South America|Paraguayan
Chile|Santiago|Valparaiso|South America|Chilean
Guyana|Georgetown|Linden|South America|Guyanese
Australia|Canberra|Sydney|Oceania|Australian
Fiji|Suva|Nadi|Oceania|Fijian
""")

# a word | its opposite; records ask for both
ANTONYMS = _rows("""
hot|cold; rich|poor; wet|dry; strong|weak; wide|narrow; thick|thin; clean|dirty; true|false; alive|dead; full|empty
male|female; victory|defeat; arrival|departure; import|export; maximum|minimum; ancient|modern; increase|decrease
positive|negative; optimist|pessimist; success|failure; guilty|innocent; public|private; love|hate; entrance|exit
ascend|descend; include|exclude; internal|external; major|minor; temporary|permanent; buyer|seller; predator|prey
war|peace; birth|death; profit|loss; asleep|awake; visible|invisible; legal|illegal; possible|impossible
agree|disagree; appear|disappear; friend|enemy; inside|outside; always|never; everything|nothing; accept|reject
""")

# verb | past tense
VERBS = _rows("""
begin|began; blow|blew; break|broke; bring|brought; build|built; buy|bought; catch|caught; choose|chose; come|came
dig|dug; draw|drew; drink|drank; drive|drove; eat|ate; fall|fell; feel|felt; fight|fought; fly|flew; forget|forgot
forgive|forgave; freeze|froze; go|went; grow|grew; hear|heard; hide|hid; hold|held; keep|kept; know|knew; leave|left
lend|lent; lose|lost; make|made; mean|meant; meet|met; pay|paid; ride|rode; ring|rang; rise|rose; run|ran; say|said
see|saw; sell|sold; send|sent; shake|shook; shoot|shot; sing|sang; sit|sat; sleep|slept; speak|spoke; spend|spent
stand|stood; steal|stole; stick|stuck; sting|stung; strike|struck; swear|swore; sweep|swept; swim|swam; swing|swung
take|took; teach|taught; tear|tore; tell|told; think|thought; throw|threw; understand|understood; wear|wore; weep|wept
win|won
""")

# noun | plural
NOUNS = _rows("""
child|children; man|men; woman|women; tooth|teeth; foot|feet; mouse|mice; goose|geese; ox|oxen; leaf|leaves
knife|knives; wife|wives; life|lives; wolf|wolves; shelf|shelves; loaf|loaves; thief|thieves; half|halves; calf|calves
elf|elves; baby|babies; lady|ladies; party|parties; berry|berries; story|stories; army|armies; puppy|puppies
factory|factories; library|libraries; diary|diaries; box|boxes; fox|foxes; church|churches; brush|brushes; dish|dishes
glass|glasses; bench|benches; sandwich|sandwiches; witch|witches; match|matches; wish|wishes; kiss|kisses
dress|dresses; potato|potatoes; tomato|tomatoes; hero|heroes; echo|echoes; crisis|crises; oasis|oases
analysis|analyses; toy|toys; key|keys; valley|valleys; chimney|chimneys; photo|photos; radio|radios; book|books
table|tables; bridge|bridges; window|windows; lamp|lamps; street|streets; pencil|pencils; bottle|bottles
candle|candles; ticket|tickets; basket|baskets; engine|engines; button|buttons; chair|chairs; spider|spiders
""")

# adjective | stem before -er and -est
ADJECTIVES = _rows("""
hot|hott; cold|cold; rich|rich; poor|poor; wet|wett; dry|dri; strong|strong; weak|weak; wide|wid; thick|thick
thin|thinn; clean|clean; dirty|dirti; big|bigg; small|small; long|long; young|young; brave|brav; bright|bright
calm|calm; cheap|cheap; cool|cool; dark|dark; deep|deep; easy|easi; fast|fast; funny|funni; great|great; happy|happi
hard|hard; heavy|heavi; high|high; hungry|hungri; large|larg; lazy|lazi; light|light; loud|loud; low|low; lucky|lucki
mild|mild; neat|neat; nice|nic; noisy|noisi; proud|proud; pure|pur; quick|quick; rough|rough; safe|saf; sad|sadd
sharp|sharp; slow|slow; smart|smart; smooth|smooth; soft|soft; steep|steep; strange|strang; sweet|sweet; tall|tall
tiny|tini; tough|tough; ugly|ugli; warm|warm; wild|wild; wise|wis; tidy|tidi; busy|busi; pretty|pretti; dusty|dusti
crazy|crazi
""")

# category | members
CATEGORIES = _rows("""
bird|robin|eagle|sparrow|penguin|owl|pigeon
fish|salmon|trout|tuna|herring|shark|sardine
mammal|elephant|giraffe|whale|kangaroo|tiger|rabbit
insect|ant|beetle|mosquito|butterfly|grasshopper|wasp
reptile|lizard|crocodile|tortoise|cobra|iguana|chameleon
tree|oak|willow|birch|maple|poplar|elm
flower|tulip|daisy|orchid|lily|daffodil|marigold
fruit|banana|mango|apricot|grape|lemon|pear
vegetable|carrot|cabbage|spinach|broccoli|celery|onion
tool|hammer|screwdriver|chisel|pliers|shovel|wrench
instrument|violin|trumpet|flute|guitar|cello|clarinet
vehicle|truck|bicycle|tractor|tram|motorcycle|ambulance
gemstone|ruby|emerald|sapphire|topaz|opal|diamond
fabric|silk|cotton|velvet|denim|linen|wool
sport|tennis|hockey|rugby|volleyball|badminton|basketball
color|purple|yellow|magenta|beige|crimson|scarlet
""")

# part of speech | words with no other part of speech
PARTS_OF_SPEECH = _rows("""
noun|kitchen|justice|freedom|hospital|knowledge|furniture|umbrella|teacher|courage|honesty
noun|restaurant|village|accident|science|history|wisdom|childhood|friendship|grandmother|mountain
verb|destroy|believe|arrive|explain|discover|remember|decide|enjoy|protect|obey
verb|admire|deny|imagine|improve|prevent|borrow|behave|apologize|persuade|celebrate
adjective|beautiful|famous|nervous|dangerous|wonderful|terrible|curious|enormous|careful|useful
adjective|jealous|generous|delicious|stubborn|anxious|grateful|helpful|horrible|ridiculous|gorgeous
adverb|quickly|often|seldom|suddenly|perhaps|softly|already|carefully|rarely|gladly
adverb|loudly|badly|happily|slowly|quietly|soon|eagerly|sometimes|recently|bravely
""")

# element | symbol
ELEMENTS = _rows("""
hydrogen|H; helium|He; lithium|Li; beryllium|Be; boron|B; carbon|C; nitrogen|N; oxygen|O; fluorine|F; neon|Ne; sodium|Na
magnesium|Mg; aluminum|Al; silicon|Si; phosphorus|P; sulfur|S; chlorine|Cl; argon|Ar; potassium|K; calcium|Ca
titanium|Ti; vanadium|V; chromium|Cr; manganese|Mn; iron|Fe; cobalt|Co; nickel|Ni; copper|Cu; zinc|Zn; gallium|Ga
germanium|Ge; arsenic|As; selenium|Se; bromine|Br; krypton|Kr; rubidium|Rb; strontium|Sr; yttrium|Y; zirconium|Zr
niobium|Nb; molybdenum|Mo; ruthenium|Ru; rhodium|Rh; palladium|Pd; silver|Ag; cadmium|Cd; indium|In; tin|Sn
antimony|Sb; tellurium|Te; iodine|I; xenon|Xe; cesium|Cs; barium|Ba; lanthanum|La; tungsten|W; osmium|Os; iridium|Ir
platinum|Pt; gold|Au; mercury|Hg; thallium|Tl; bismuth|Bi; polonium|Po; radon|Rn; radium|Ra; thorium|Th; uranium|U
plutonium|Pu; americium|Am
""")

# unit | number of smaller units in it | smaller unit
UNITS = _rows("""
hours|60|minutes; minutes|60|seconds; days|24|hours; weeks|7|days; years|12|months; centuries|100|years
kilometers|1000|meters; meters|100|centimeters; kilograms|1000|grams; tonnes|1000|kilograms; liters|1000|milliliters
""")

# words for the families "uppercase" and "spelling"
WORDS = _words("""
apron arrow attic badge barrel beach blanket branch bread breeze brick broom bucket butter cabin camera canal canvas
carpet castle ceiling cellar cereal chain cheese circle cliff clock cloud coast coffee collar corner couch cradle cream
crown curtain desert dinner doctor dragon drawer driver farmer feather fence field finger flame floor forest garage
garden ghost giant glove grass hammock harbor helmet honey hotel island jacket jewel jungle kettle kitten ladder lantern
laptop locker magnet market meadow medal melody mirror mitten museum needle nephew ocean office oven palace paper parcel
pepper pillow pirate planet plate pocket poem prince puzzle queen ribbon river robot rocket roof saddle salad sandal
scarf school season shadow shirt signal soldier spoon statue stone sugar sweater temple throat thunder tower tunnel
uncle wagon wallet wizard
""")

ONES = _words("""
zero one two three four five six seven eight nine ten
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
""")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
