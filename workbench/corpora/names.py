"""Names of people, places and ships that exist nowhere else, and the words of the second language.

Law: every name belongs to exactly one list, so a name alone tells what kind of thing it is.
Source: invented by this project; relations.py makes facts of the names, language.py a dictionary of the words.
"""

from .item import words

PEOPLE = words(
    """
kalon ralim deivya rosil fusil tulra vusus zomya zivus hunim manon vulon mavra tailus konim veirus noron
tavim brirra kesya teirus lailim musim nasus fulil mivon vaimra kalya thesra zemil geiron vivra kimus gurya
keivil geivus mailim runim nasya feimon nimek vusim nasek zelra brulra brasek zumya heivra
"""
)

FATHERS = words(
    """
zebard megorn zibard zetard kibard natard negorn zekorn nidard zadorn hitorn bedard redard katorn nokund
vedard kaborn ribard fatard gikorn
"""
)

MOTHERS = words(
    """
melella vusella ruvella suvuna sumuna ralella vavella buluna sanuna roluna remuna fonuna momissa hivella
lusella favella bovella livissa zivella vosissa
"""
)

TEACHERS = words(
    """
griloth granoth troloth kroneth stoneth stuloth stoleth trunoth traxoth groneth gramoth stanoth kruleth
trameth trexeth kremeth
"""
)

TOWNS = words(
    """
sterwick stonstead dosstead riswick polholm furstead firholm stoswick durwick nanwick stonwick pimwick
bresholm kilstead stenwick pisford nelwick stalford lelholm lelford benwick kirholm velstead konford bonford
sesford pimford mosford telholm gumford vulstead zelford solford falwick girholm kosford ninstead kelholm
zirstead sinwick
"""
)

COUNTRIES = words(
    """
hullandia funmark garlandia nunmark paslandia dirmark pelmark fanlandia lulmark ruslandia
"""
)

RIVERS = words(
    """
salbrook zurbrook runflow fosbrook marflow lelflow palflow sulbrook darbrook desbrook birbrook volbrook
"""
)

SHIPS = words(
    """
fleezero skekero quokilo skexara floadero plakero whoazilo plitero plekilo skoatero swoakilo whipara plekero
swadara quedara skodilo whoxilo pledero swoxilo skozilo plapero whezero wheezero floapilo quoakara skeetara
skotara swotero swoxara flikero flakero quezara ploapilo skizara whoatero ploazara swodero skoxara skeedero
flexara
"""
)

VELISH_WORDS = words(
    """
yoju watla shoxe wotleq tlaxe yaju yazha yaqon yatlu chazhon xezhux jatlo zaqu xutlu xaxu woxa yazhu weqe
xuqu xaxe xakiq shotlu yaqax yujo yaqa zejaq wixeq jakoq shotlin zotlax jiqe xuzhaq tlika wezhux yotla yiqin
shuju chozhin xexi shatla chaqa xiqe wuxi weqiq shoxa wiken xekin yaqe chizhan zoka yaqin jitlex chike xezhi
zexe tlizhon zaxo yiqon xotlon wozhen xeqiq yitlan wetlu tlaqo yuzhu yaqoq shajiq jaqon zuqo zuxe shizho
jake zujan chozheq yaja zijeq wetleq yijiq zozhix zuken shukux tleke chozhe shukaq shatlo chuxe choqan ziqi
sheja chutlaq jutlex chuje cheji chaxa wexi zoji shoke xetlon yixiq jezhe xatle tlajuq jixoq zejix yikin
wuqe tlukan shaxen shixen xazhen jiko chiqaq xatla chexiq shetlu shoji yiqox shexo yuqo shazhux wekux jaqe
yuke wuzheq chezhaq choku zukaq yezhen jatlu wukan tlojax yoko tlitlo juqa xizha shajux xijuq xaqi shuqax
tlezheq jiqex xakon choje jeqi shukix jexon yuka chuqa jeki chitliq
"""
)
